"""Runs under torchrun, or alone: several one-step trainings, whose gradients the first rank writes down.

python -m torch.distributed.run --nproc-per-node 2 -m tests.trainer.ranks CASES.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import emkd.trainer.run
from emkd.trainer import Recipe, TrainSettings, train_student, with_flags
from emkd.trainer.loop.trainer import DistillationTrainer
from emkd.trainer.report import rank


class WriteGradients(TrainerCallback):
    """What the optimizer is about to see, of each parameter that has a gradient."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step:
            return
        model = getattr(model, "module", model)
        found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        if state.is_world_process_zero:
            safetensors.torch.save_file(found, self.path)


def whole(gradient: torch.Tensor) -> torch.Tensor:
    """A copy; of a sharded student, gathered from all ranks."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def run(case: dict[str, Any]) -> None:
    """One training with the gradients of its first step in `case["gradients"]`."""

    class Observed(DistillationTrainer):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.add_callback(WriteGradients(Path(case["gradients"])))

    emkd.trainer.run.DistillationTrainer = Observed
    flags = {
        "training.max_steps": 1, "training.max_grad_norm": 0.0, "training.save_strategy": "no",
        "student.vision_pool": 2, **case["flags"],
    }  # fmt: skip
    others = {name: value for name, value in case.items() if name not in ("ranks", "gradients", "output", "flags")}
    output = Path(case["output"])
    metrics = train_student(TrainSettings(output=output, recipe=with_flags(Recipe(), flags), **others))
    if rank() == 0:
        Path(case["gradients"]).with_suffix(".json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for chosen in json.loads(Path(sys.argv[1]).read_text()):
        if chosen["ranks"] == world:
            run(chosen)
