"""What transformers.Trainer does differently for a sharded student (student/sharding.py).

    checkpoint-<step>/optimizer/    the optimizer's state in the format of torch's distributed checkpoint: one file of
                                    each rank that wrote it, and .metadata

States are named after parameters, so that any number of ranks reads what any other number wrote. The weights are saved
whole, as those of any student, and the learning rate's schedule is one for all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from emkd.errors import DamagedCheckpointError
from emkd.trainer.student.sharding import is_sharded

FOLDER = "optimizer"


class ShardedTrainer(Trainer):
    """Trainer for a model that may be sharded: one that is gathers its parameters and reduces its gradients itself.

    Overridden methods, and the reasons:

    _move_model_to_device            the parts are where they belong
    _defer_fsdp_gradient_reduction   each micro-batch's gradient is reduced: a whole one takes the memory that is saved
    _save_optimizer_and_scheduler, _load_optimizer_and_scheduler
                                     Trainer's own would save the first rank's part alone
    """

    sharded = False

    def __init__(self, model: Any, **given: Any) -> None:
        super().__init__(model=model, **given)
        # Then neither Trainer nor accelerate wraps the model.
        self.is_distributed_loading_by_transformers = self.sharded = is_sharded(model)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        yield

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.model, self.optimizer, Path(output_dir))
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.model, self.optimizer, Path(checkpoint))
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def save_optimizer(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Write the optimizer's state. All ranks have to call this. optimizer: accelerate's, or torch's own"""
    state: dict[str, Any] = get_optimizer_state_dict(model, _plain(optimizer))
    distributed_checkpoint.save(state, checkpoint_id=checkpoint / FOLDER)


def load_optimizer(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Read the state that `save_optimizer` wrote. All ranks have to call this. Raises DamagedCheckpointError."""
    folder = checkpoint / FOLDER
    if not folder.is_dir():
        raise DamagedCheckpointError(
            f"{checkpoint} has no folder {FOLDER}: a run without student.shard saved it, and a sharded one cannot read "
            "its optimizer. Resume without --shard, or start a new run from its weights"
        )
    state: dict[str, Any] = get_optimizer_state_dict(model, _plain(optimizer))
    distributed_checkpoint.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, _plain(optimizer), state)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return plain
