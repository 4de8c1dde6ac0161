"""transformers.TrainingArguments in a recipe: which fields may be set, our defaults, and the arguments of a run."""

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from emkd.errors import UsageError
from emkd.trainer.report import log

# What emkd decides itself: the order of samples and the columns that a batch has.
RESERVED = {
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "remove_unused_columns": "batches hold cached records, which no model takes as columns",
    "group_by_length": "samples come shard by shard, so that reads of the cache are whole",
    "train_sampling_strategy": "samples come shard by shard, so that reads of the cache are whole",
    "length_column_name": "samples come shard by shard, so that reads of the cache are whole",
    "data_seed": "training.seed decides the order of samples",
    "ignore_data_skip": "a resumed run goes on with the exact next sample, and skipping costs nothing here",
    "accelerator_config": "batches are split over workers by trainer/order.py, so that every sample comes once",
    "dataloader_in_order": "the order of samples is a function of the seed, or a run could not be resumed",
    "label_smoothing_factor": "the losses are those of docs/method.md, and smoothing is none of them",
    "label_names": "batches hold cached records and no labels",
    "average_tokens_across_devices": "losses are always divided by the counts of all workers",
    "auto_find_batch_size": "a step's losses are divided by its counts and resumed by its number; its size is fixed",
    "neftune_noise_alpha": "noise on embeddings would move the hidden states that the affinities are computed from",
    "fsdp": "the LM head is applied to hidden states outside of the model's forward, where its weights are not whole",
    "fsdp_config": "see fsdp",
    "deepspeed": "the LM head is applied to hidden states outside of the model's forward, and its weights may be away",
    "parallelism_config": "a sample's tokens are matched on one device",
    "torch_compile": "hidden states are taken by a hook, which a compiled model may not call",
    "save_on_each_node": "checkpoints lie in one folder that all workers see",
    "push_to_hub": "the output folder is a checkpoint; upload it when it is done",
}

# Where TrainingArguments would do something that this kind of run does not want.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-5,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss that is no number is shown as such
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Said where there is nothing else: or bf16 is refused, and several processes train side by side, not together.
    "use_cpu": not torch.accelerator.is_available(),
    # Towers have layers that a LLaVA reads nothing from, and a step may have no image on one rank.
    "ddp_find_unused_parameters": True,
}


# The least value of fields that TrainingArguments takes any number for.
AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "torch_empty_cache_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "eval_delay"), 0),
    **dict.fromkeys(("dataloader_num_workers", "seed"), 0),
}
ABOVE_ZERO = {"num_train_epochs", "logging_steps", "save_steps", "eval_steps"}

# What people mean who know the flags of the command line.
FLAGS = {"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs"}

METRICS = ("accuracy", "loss", "answer_tokens", "skipped_rows")


def known_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they are meant. Raises ValueError for one that does not exist or cannot work, with the reason."""
    known = [name for name in TYPES if name not in RESERVED]
    found = {}
    for name, value in given.items():
        if name in RESERVED:
            raise ValueError(f"training.{name} cannot be set: {RESERVED[name]}")
        if name not in TYPES:
            meant = f"; did you mean {FLAGS[name]!r}?" if name in FLAGS else nearest(str(name), known)
            raise ValueError(f"training.{name} is no field of transformers.TrainingArguments{meant}")
        found[name] = _as_meant(name, value)
        _check_range(name, found[name])
    return found


TYPES: dict[str, Any] = get_type_hints(TrainingArguments)
_STRICTLY_NUMBERS = ConfigDict(allow_inf_nan=False)


def _as_meant(name: str, value: Any) -> Any:
    """YAML reads 2e-5 as a text, because it has no point, and `no` as false; people mean the number and the word."""
    if name.endswith("_strategy") and value is False:
        return "no"
    try:
        found = TypeAdapter(TYPES[name], config=_STRICTLY_NUMBERS).validate_python(value)
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
    if name in ABOVE_ZERO and value <= 0:
        raise ValueError(f"training.{name}: must be more than 0, got {value!r}")
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"training.max_steps: must be at least 1, or -1 for whole epochs, got {value!r}")


def same_in_effect(training: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are other than what holds without them."""
    plain = {field.name: field.default for field in dataclasses.fields(TrainingArguments)} | DEFAULTS
    return {name: value for name, value in training.items() if value != plain[name]}


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all where they are few."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}" if len(known) < 20 else ""


def training_arguments(output: Path, training: Mapping[str, Any], evaluates: bool = False) -> TrainingArguments:
    """TrainingArguments of a recipe's `training` over our defaults. Raises UsageError."""
    given = {**DEFAULTS, **training}
    if not evaluates and (given.get("eval_strategy", "no") != "no" or given.get("load_best_model_at_end")):
        raise UsageError(
            "training.eval_strategy and load_best_model_at_end need data to evaluate on: name them with --eval-data"
        )
    metric = str(given.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if metric not in METRICS:
        raise UsageError(
            f"training.metric_for_best_model: there is no metric {metric!r}{nearest(metric, list(METRICS))}"
        )
    try:
        arguments = TrainingArguments(
            output_dir=str(output), remove_unused_columns=False, average_tokens_across_devices=False, **given
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UsageError(f"the recipe's training section: {error}") from error
    if arguments.n_gpu > 1:  # Trainer would split batches over them by threads, and records cannot be split so
        log(
            f"{arguments.n_gpu} GPUs are visible; one process trains on one of them, --workers {arguments.n_gpu} on all"
        )
        arguments._n_gpu = 1
    return arguments
