"""Recipes: everything that decides a training run but the paths, as a YAML file or from the command line.

    losses:    {alpha: 0.5, beta: 0.25, gamma: 25, tail: uniform, matching: logits, top_k: null}
    student:   {vision_pool: 2, freeze: [model.vision_tower]}
    training:  {learning_rate: 2.0e-3, max_steps: 150, ...}     any field of transformers.TrainingArguments

Flags of the command line go over the file. An unknown key is refused with the nearest known one.
"""

import dataclasses
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers import TrainingArguments

from emkd.errors import InputNotFoundError, UsageError
from emkd.trainer.losses import Tail
from emkd.trainer.matching import Matching
from emkd.trainer.objective import Weights

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
    "fsdp": "the LM head is applied to vision tokens outside of the model's forward, where its weights are not whole",
    "fsdp_config": "see fsdp",
    "deepspeed": "the LM head is applied to vision tokens outside of the model's forward, and its weights may be away",
    "parallelism_config": "a sample's tokens are matched on one device",
    "torch_compile": "hidden states are taken by a hook, which a compiled model may not call",
    "push_to_hub": "the output folder is a checkpoint; upload it when it is done",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossRecipe(_Section):
    """Weights of the paper (arXiv 2511.21106), and how a cut teacher is read.

    top_k: logits of a vision token that are used; null is all that are stored
    """

    alpha: float = Field(default=0.5, ge=0, le=1)
    beta: float = Field(default=0.25, ge=0)
    gamma: float = Field(default=25.0, ge=0)
    tail: Tail = "uniform"
    matching: Matching = "logits"
    top_k: int | None = Field(default=None, ge=1)

    @property
    def weights(self) -> Weights:
        return Weights(alpha=self.alpha, beta=self.beta, gamma=self.gamma)


class LoraRecipe(_Section):
    """Low-rank additions to the linear layers below `modules`, whose own weights do not learn. Needs peft.

    r, alpha: rank and scale of LoRA (arXiv 2106.09685);  dropout: of the additions' inputs
    modules:  by the beginning of their parameters' names; embeddings and LM head among them are only frozen
    """

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    modules: tuple[str, ...] = ("model.language_model", "lm_head")


class StudentRecipe(_Section):
    """vision_pool: side of the window of vision tokens that become one; null leaves the student as it is.
    freeze: modules that do not learn, by the beginning of their parameters' names.
    learning_rates: peak learning rate by the beginning of parameters' names, the longest one deciding; all other
    parameters have training.learning_rate.
    dtype: of the weights; small updates are lost in bfloat16 weights, so use training.bf16 (autocast) for speed."""

    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    vision_pool: int | None = Field(default=None, ge=1)
    freeze: tuple[str, ...] = ()
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    lora: LoraRecipe | None = None


class Recipe(_Section):
    """The whole file.

    window:      shards that are decoded at a time (by each loader worker)
    max_skipped: share of the samples that may turn out to be of no use to the student
    """

    losses: LossRecipe = LossRecipe()
    student: StudentRecipe = StudentRecipe()
    training: dict[str, Any] = Field(default_factory=dict)
    window: int = Field(default=2, ge=1)
    max_skipped: float = Field(default=0.01, ge=0, le=1)

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        known = [f.name for f in dataclasses.fields(TrainingArguments)]
        for name in given:
            if name in RESERVED:
                raise ValueError(f"training.{name} cannot be set: {RESERVED[name]}")
            if name not in known:
                raise ValueError(
                    f"training.{name} is no field of transformers.TrainingArguments{_nearest(name, known)}"
                )
        return {name: _as_meant(name, value) for name, value in given.items()}


_SECTIONS: dict[tuple[str, ...], type[_Section]] = {
    (): Recipe,
    ("losses",): LossRecipe,
    ("student",): StudentRecipe,
    ("student", "lora"): LoraRecipe,
}


def load_recipe(path: Path | None) -> Recipe:
    """A recipe file, or the defaults. Raises InputNotFoundError, UsageError."""
    if path is None:
        return Recipe()
    if not path.is_file():
        raise InputNotFoundError(f"no recipe at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    return make_recipe(content or {}, str(path))


def make_recipe(content: Any, where: str) -> Recipe:
    """A recipe from a mapping; raises UsageError naming each wrong key and its nearest known one."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: " + "; ".join(_explain(dict(e)) for e in error.errors())) from error


def with_flags(recipe: Recipe, flags: dict[str, Any]) -> Recipe:
    """The recipe with the flags that were given (not None), by dotted name such as `losses.alpha`."""
    content = recipe.model_dump()
    for name, value in flags.items():
        if value is None:
            continue
        *sections, last = name.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    return make_recipe(content, "command line")


def _as_meant(name: str, value: Any) -> Any:
    """YAML reads 2e-5 as a text, because it has no point, and `no` as false; people mean the number and the word."""
    if name.endswith("_strategy") and value is False:
        return "no"
    default = next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == name)
    try:
        return float(value) if isinstance(value, str) and type(default) in (int, float) else value
    except ValueError:
        return value


def _explain(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the recipe"
    if error["type"] == "extra_forbidden":
        section = _SECTIONS[error["loc"][:-1]]
        return f"unknown key {place!r}{_nearest(str(error['loc'][-1]), list(section.model_fields))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{place}: {error['msg']}, got {error['input']!r}"


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}" if len(known) < 20 else ""
