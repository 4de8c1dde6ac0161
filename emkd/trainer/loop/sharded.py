"""What transformers.Trainer does differently for a sharded student (student/sharding.py).

    checkpoint-<step>/optimizer/    the optimizer's state in the format of torch's distributed checkpoint: one file of
                                    each rank that wrote it, .metadata, and groups.pt: learning rates and the like

States are named after parameters, so that any number of ranks reads what any other number wrote. The weights are saved
whole, as those of any student, and the learning rate's schedule is one for all ranks.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import distributed
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from emkd.errors import DamagedCheckpointError, UsageError
from emkd.trainer.loop.checkpoints import SHARDED_OPTIMIZER_NAME
from emkd.trainer.report import log
from emkd.trainer.student.sharding import check_ranks, is_sharded

GROUPS_NAME = "groups.pt"

# Of training.optim, those that work on each part of a parameter alone.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def check_arguments(args: TrainingArguments) -> None:
    """Raise UsageError for arguments with which a sharded student cannot be trained."""
    check_ranks(args.world_size)
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in OPTIMIZERS:
        raise UsageError(
            f"training.optim {optimizer}: it does not work on the parts of parameters that each worker has "
            f"(student.shard); use one of {', '.join(OPTIMIZERS)}, or train without --shard"
        )
    checkpointing = args.activation_checkpointing_kwargs
    if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise UsageError(
            "training.activation_checkpointing_kwargs: use_reentrant: true would free the parts of a sharded student "
            "in the middle of its backward pass; leave it out"
        )
    if (args.bf16 or args.fp16) and not args.activation_checkpointing:
        log(
            "without training.activation_checkpointing each worker keeps a half-precision copy of the whole student's "
            "layers from forward to backward, which --shard does not divide"
        )


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
        if self.sharded:  # autocast's cache would keep whole weights in half precision until the losses are done
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)

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
        _say_if_other_ranks(Path(checkpoint), self.args.world_size)
        load_optimizer(self.model, self.optimizer, Path(checkpoint))
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def _say_if_other_ranks(checkpoint: Path, n_ranks: int) -> None:
    saved = len(list(checkpoint.glob("rng_state_*.pth")))
    if saved != n_ranks:
        log(
            f"{checkpoint} was saved by {saved} workers, and {n_ranks} resume from it: weights, optimizer and samples "
            "go on; dropout, if the student has any, draws other numbers"
        )


def save_optimizer(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Write the optimizer's state. All ranks have to call this. optimizer: accelerate's, or torch's own"""
    folder, plain = checkpoint / SHARDED_OPTIMIZER_NAME, _plain(optimizer)
    distributed_checkpoint.save({"state": _states(model, plain)}, checkpoint_id=folder)
    if distributed.get_rank() == 0:
        groups = [{name: value for name, value in one.items() if name != "params"} for one in plain.param_groups]
        torch.save(groups, folder / GROUPS_NAME)


def load_optimizer(model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Read the state that `save_optimizer` wrote. All ranks have to call this. Raises DamagedCheckpointError."""
    folder, plain = checkpoint / SHARDED_OPTIMIZER_NAME, _plain(optimizer)
    if not folder.is_dir():
        raise DamagedCheckpointError(
            f"{checkpoint} has no folder {SHARDED_OPTIMIZER_NAME}, which checkpoints of sharded students have: start a "
            "new run, with it as --student and another --output"
        )
    saved = distributed_checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    _make_states(model, plain, {name.removeprefix("state.").rpartition(".")[0] for name in saved})
    state = {"state": _states(model, plain)}
    distributed_checkpoint.load(state, checkpoint_id=folder)
    for name, parameter in model.named_parameters():
        if name in state["state"]:
            plain.state[parameter].update(state["state"][name])
    for group, found in zip(plain.param_groups, torch.load(folder / GROUPS_NAME, weights_only=True), strict=True):
        group.update(found)


def _states(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter that has one, by name: unused parameters have no gradient and no state."""
    named = model.named_parameters()
    return {name: dict(optimizer.state[parameter]) for name, parameter in named if parameter in optimizer.state}


def _make_states(model: Any, optimizer: torch.optim.Optimizer, names: Collection[str]) -> None:
    """Let an optimizer make the state of some parameters: a step with a learning rate and gradients of 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if name in names else None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return plain
