"""Before the first step: everything that can refuse is built and tried, so that no hour of training is lost to it.

    rehearse        loader, learning rates, a first forward pass, what is saved beside the weights, room on the disk
    until_stepped   the same care for what only transformers.Trainer builds, until the first step is done

What a library raises becomes a UsageError that names the fields of the recipe that were set, and what to do; a student
that its own processor does not fit becomes a ModelError.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_liger_kernel_available

from emkd.errors import EmkdError, ModelError, UsageError
from emkd.temporary import too_long_for_loaders
from emkd.trainer.data.samples import StudentSample
from emkd.trainer.loop.loaders import n_workers
from emkd.trainer.loop.trainer import DistillationTrainer
from emkd.trainer.report import log
from emkd.trainer.student.saving import try_saving
from emkd.trainer.student.sharding import free
from emkd.units import size_text
from emkd.vlm.forward import evaluating, to_model

LOADER = (
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_pin_memory",
    "dataloader_multiprocessing_context",
)  # fmt: skip
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
TRIED = 8  # samples, of which the first with an image goes through the student

# What a library raises about its settings; a lost connection to another rank is a RuntimeError.
LIBRARY_ERRORS = (ValueError, TypeError, ImportError, KeyError, AttributeError, IndexError, NotImplementedError)


def rehearse(trainer: DistillationTrainer, training: Mapping[str, Any]) -> None:
    """Try what the run needs. Nothing is left of it, and no random state moves.

    training: the recipe's section, of which the fields that matter are named

    Raises UsageError, ModelError.
    """
    args = trainer.args
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UsageError(
            "training.use_liger_kernel true: the package liger-kernel is not installed; pip install liger-kernel, or "
            "leave the field out"
        )
    with guarded("the loader of batches", LOADER, training):
        loader = trainer.get_train_dataloader()
    _check_sockets(args.dataloader_num_workers)
    if n_workers(args) < args.dataloader_num_workers:
        log(
            f"dataloader_num_workers {args.dataloader_num_workers}: {n_workers(args)} are started, because there are "
            "no more processors"
        )
    with guarded("the schedule of the learning rate", SCHEDULE, training):
        trainer.try_scheduler(trainer.set_initial_training_values(args, loader)[-1])
    try_saving(trainer.student)
    _check_space(trainer)
    _first_pass(trainer, next(iter(loader.batch_sampler)))


@contextmanager
def guarded(what: str, fields: Sequence[str], training: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a library raises into a UsageError that names the fields that the recipe sets."""
    try:
        yield
    except (*LIBRARY_ERRORS, RuntimeError) as error:
        if isinstance(error, EmkdError):
            raise
        chosen = ", ".join(f"training.{name} {training[name]!r}" for name in fields if name in training)
        raise UsageError(
            f"{what} cannot be made{' with ' + chosen if chosen else ''}: {short(error)}. Correct "
            f"{'these fields' if chosen else 'the fields ' + ', '.join(fields)} of the recipe, or leave them out"
        ) from error


@contextmanager
def until_stepped(trainer: DistillationTrainer, training: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a library raises before the first step is done into a UsageError; later errors stay as they are."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if trainer.has_stepped:
            raise
        raise UsageError(
            f"the first step does not fit into the memory of {trainer.args.device}: {short(error)}. Use a smaller "
            "training.per_device_train_batch_size (and more gradient_accumulation_steps), "
            "training.activation_checkpointing, or student.lora"
        ) from error
    except (*LIBRARY_ERRORS, RuntimeError) as error:
        alone = trainer.args.world_size == 1
        if isinstance(error, EmkdError) or trainer.has_stepped or not (alone or isinstance(error, LIBRARY_ERRORS)):
            raise
        named = [name for name in training if _about(name, training[name], str(error))]
        which = ", ".join(f"training.{name} {training[name]!r}" for name in named)
        raise UsageError(
            f"the first step failed: {short(error)}. {'It is about ' + which if which else 'These fields are set'}: "
            f"{'correct it, or leave it out' if which else ', '.join(training)}"
        ) from error


def _about(name: str, value: Any, said: str) -> bool:
    """Whether an error names a field, or a key of its mapping."""
    words = [name, *(value if isinstance(value, dict) else ())]
    return any(str(word) in said for word in words)


def _first_pass(trainer: DistillationTrainer, elements: Sequence[int]) -> None:
    """Run the loss of one sample, the first of a few with an image if there is one. Raises ModelError."""
    sample = _sample(trainer, elements)
    if sample is None and not trainer.sharded:
        return  # unusable rows are counted by the run itself
    model, objective = trainer.student.model, trainer.objective
    collate: Any = trainer.data_collator  # Trainer's own take dictionaries
    batch = collate([] if sample is None else [sample])
    counts = objective.count(batch["samples"])
    try:
        with torch.no_grad(), evaluating(model), trainer.accelerator.autocast():
            objective(model, model, to_model(batch["inputs"], model), batch["samples"], counts)
    except (*LIBRARY_ERRORS, RuntimeError) as error:
        if isinstance(error, EmkdError | torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{trainer.student.vlm.path}: the student cannot take what its processor makes of a row: {short(error)}; "
            "config.json and processor_config.json have to be of one model"
        ) from error
    finally:
        free(model)
        trainer.forget_readings()


def _sample(trainer: DistillationTrainer, elements: Sequence[int]) -> StudentSample | None:
    dataset: Any = trainer.train_dataset
    found = None
    for element in elements[:TRIED]:
        sample = dataset[element]
        if isinstance(sample, StudentSample):
            found = found or sample
            if sample.encoded.images:
                return sample
    return found


def _check_sockets(n_workers: int) -> None:
    """Raise UsageError if loader workers cannot hand over tensors, which they do through sockets."""
    said = too_long_for_loaders()
    if n_workers and said:
        raise UsageError(f"training.dataloader_num_workers {n_workers}: {said}")


def _check_space(trainer: DistillationTrainer) -> None:
    """Raise UsageError if not even one checkpoint, or the student, fits onto the disk."""
    if not trainer.is_world_process_zero():
        return
    n_bytes = trainer.checkpoint_bytes() if trainer.args.save_strategy != "no" else trainer.weight_bytes()
    free = shutil.disk_usage(_existing(trainer.output)).free
    if n_bytes > free:
        raise UsageError(
            f"--output {trainer.output}: a checkpoint takes about {size_text(n_bytes)}, and {size_text(free)} are "
            "free; make room, or name a folder on another disk"
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def short(error: BaseException) -> str:
    """Return the kind and the first line of an error, without its final stop."""
    line = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {line[:300].rstrip('.')}"
