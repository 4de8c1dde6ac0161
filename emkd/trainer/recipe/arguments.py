"""transformers.TrainingArguments in a recipe: which fields may be set, emkd's defaults, and the arguments of a run."""

import dataclasses
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from emkd.errors import UsageError
from emkd.trainer.report import log

# Fields that cannot be set, with the reason.
RESERVED = {
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "remove_unused_columns": "batches hold cached records, which are not columns of the model's inputs",
    "group_by_length": "samples are read shard by shard, so that each shard is read once",
    "train_sampling_strategy": "samples are read shard by shard, so that each shard is read once",
    "length_column_name": "samples are read shard by shard, so that each shard is read once",
    "data_seed": "training.seed decides the order of samples",
    "ignore_data_skip": "a resumed run continues with the exact next sample, and skipping to it costs nothing",
    "accelerator_config": "emkd divides batches among the workers itself, so that every sample is used once per epoch",
    "dataloader_in_order": "the order of samples has to be a function of the seed, or a run could not be resumed",
    "label_smoothing_factor": "the paper's losses have no label smoothing",
    "label_names": "batches hold cached records and no labels",
    "average_tokens_across_devices": "losses are always divided by the counts of all workers",
    "auto_find_batch_size": "losses are divided by a step's counts, and runs resume at a step: its size is fixed",
    "neftune_noise_alpha": "noise on embeddings would change the hidden states that affinities are computed from",
    "fsdp": "student.shard: true (--shard) shards the student with FSDP2; here the LM head's gradient would be wrong",
    "fsdp_config": "see fsdp",
    "deepspeed": "the LM head is called outside of the model's forward, where DeepSpeed may have released its weights; "
    "student.shard: true (--shard) shards the student with FSDP2",
    "parallelism_config": "all tokens of a sample are matched on one device",
    "torch_compile": "hidden states are read by a forward hook, which a compiled model may not call",
    "enable_jit_checkpoint": "training.save_on_signal saves a checkpoint on SIGINT and SIGTERM",
    "save_on_each_node": "checkpoints are written to one folder that all workers share",
    "push_to_hub": "the output folder can be loaded as it is; upload it when the run is done",
}

# Defaults that differ from those of TrainingArguments.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-5,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss of NaN is logged as NaN
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Without an accelerator it has to be set: otherwise bf16 is refused, and several processes do not train together.
    "use_cpu": not torch.accelerator.is_available(),
    # A vision tower may have layers whose outputs LLaVA does not use, and a rank may have a step without images.
    "ddp_find_unused_parameters": True,
}


# The minimum of fields for which TrainingArguments accepts any number.
AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "torch_empty_cache_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "eval_delay"), 0),
    **dict.fromkeys(("dataloader_num_workers", "seed"), 0),
}
AT_MOST = {"seed": 2**32 - 1}  # NumPy's
ABOVE_ZERO = {"num_train_epochs", "logging_steps", "save_steps", "eval_steps"}

# Fields of the section that are emkd's and not of TrainingArguments, with their defaults.
OWN: dict[str, bool] = {
    "save_on_signal": True,  # SIGINT and SIGTERM save a checkpoint after the step in hand
}

CHECKPOINTING = [
    name
    for name, parameter in inspect.signature(checkpoint).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]

# Flags of the command line, and the fields that they set.
FLAGS = {"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs"}

METRICS = ("accuracy", "loss", "answer_tokens", "skipped_rows")


def known_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with values of their types.

    Raises ValueError, with the reason, for a field that does not exist or cannot be set, or a value out of range.
    """
    known = [*OWN, *(name for name in TYPES if name not in RESERVED)]
    found = {}
    for name, value in given.items():
        if name in RESERVED:
            raise ValueError(f"training.{name} cannot be set: {RESERVED[name]}")
        if name not in TYPES and name not in OWN:
            meant = f"; did you mean {FLAGS[name]!r}?" if name in FLAGS else nearest(str(name), known)
            raise ValueError(f"training.{name} is not a field of transformers.TrainingArguments{meant}")
        found[name] = _typed(name, value)
        _check_range(name, found[name])
    for key in found.get("activation_checkpointing_kwargs") or ():
        if key not in CHECKPOINTING:  # a layer that is called with it would take it as its own, and ignore it
            hint = nearest(str(key), CHECKPOINTING)
            raise ValueError(f"training.activation_checkpointing_kwargs: {key!r} is not one of its keys{hint}")
    return found


TYPES: dict[str, Any] = get_type_hints(TrainingArguments)
_STRICTLY_NUMBERS = ConfigDict(allow_inf_nan=False)


def _typed(name: str, value: Any) -> Any:
    """Convert a value to its field's type. YAML reads 2e-5, without a point, as a string, and `no` as false."""
    if name.endswith("_strategy") and value is False:
        return "no"
    try:
        found = TypeAdapter(bool if name in OWN else TYPES[name], config=_STRICTLY_NUMBERS).validate_python(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ValueError(f"training.{name}: {wrong['msg']}, got {value!r}") from error
    return value if type(found) is float and type(value) is int else found  # 25 steps stay 25


def _check_range(name: str, value: Any) -> None:
    if isinstance(value, str) or value is None:
        return
    least = AT_LEAST.get(name)
    if least is not None and value < least:
        raise ValueError(f"training.{name}: must be at least {least}, got {value!r}")
    most = AT_MOST.get(name)
    if most is not None and value > most:
        raise ValueError(f"training.{name}: must be at most {most}, got {value!r}")
    if name in ABOVE_ZERO and value <= 0:
        raise ValueError(f"training.{name}: must be more than 0, got {value!r}")
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"training.max_steps: must be at least 1, or -1 for whole epochs, got {value!r}")


def same_in_effect(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields whose values differ from the defaults."""
    plain = {field.name: field.default for field in dataclasses.fields(TrainingArguments)} | DEFAULTS | OWN
    return {name: value for name, value in training.items() if value != plain[name]}


def nearest(name: str, known: list[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or all of them if they are few."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}" if len(known) < 20 else ""


def training_arguments(output: Path, training: Mapping[str, Any], evaluates: bool = False) -> TrainingArguments:
    """Return TrainingArguments with emkd's defaults, overridden by a recipe's `training`.

    evaluates: whether there is data to evaluate on

    Raises UsageError if the fields do not fit together, or ask for an evaluation without data.
    """
    given = {**DEFAULTS, **{name: value for name, value in training.items() if name not in OWN}}
    if not evaluates and (given.get("eval_strategy", "no") != "no" or given.get("load_best_model_at_end")):
        raise UsageError(
            "training.eval_strategy and training.load_best_model_at_end need data to evaluate on: set --eval-data"
        )
    metric = str(given.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if metric not in METRICS:
        raise UsageError(f"training.metric_for_best_model: unknown metric {metric!r}{nearest(metric, list(METRICS))}")
    try:
        arguments = TrainingArguments(
            output_dir=str(output), remove_unused_columns=False, average_tokens_across_devices=False, **given
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UsageError(f"the recipe's training section: {error}") from error
    if arguments.n_gpu > 1:  # Trainer would use DataParallel, which cannot split records
        log(f"{arguments.n_gpu} GPUs are visible, and this run uses one; --workers {arguments.n_gpu} uses all of them")
        arguments._n_gpu = 1
    return arguments
