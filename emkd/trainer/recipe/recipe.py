"""Recipes: everything that decides a training run except paths, from a YAML file and the command line.

    losses:    {alpha: 0.5, beta: 0.25, gamma: 25, divergence: reverse_kl, tail: auto, matching: logits, ...}
    student:   {vision_pool: 2, freeze: [vision_tower]}
    training:  {learning_rate: 2.0e-3, max_steps: 150, ...}     any field of transformers.TrainingArguments, and
                                                                save_on_signal

Flags of the command line override the file. An unknown key is an error that names the nearest known one.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from emkd.errors import InputNotFoundError, UsageError
from emkd.recipes import recipe_names, recipe_text, which_recipes
from emkd.trainer.losses.divergence import Divergence, Kind, Tail
from emkd.trainer.losses.weights import Weights
from emkd.trainer.matching.assignment import Solver
from emkd.trainer.matching.cost import Cost, Space
from emkd.trainer.matching.match import Matching
from emkd.trainer.recipe.arguments import OWN, TYPES, known_arguments, nearest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, given: Any) -> Any:
        """Read null as an empty section: it is what YAML makes of a section whose keys are all commented out."""
        if not isinstance(given, dict):
            return given
        sections = [name for name in ("losses", "student", "training") if name in cls.model_fields]
        return {name: {} if value is None and name in sections else value for name, value in given.items()}


# A part of every family (emkd/vlm/parts.py), or a prefix of parameter names.
Module = Annotated[str, Field(min_length=1)]


class LossRecipe(_Section):
    """Weights of the paper (arXiv 2511.21106), and how a teacher's cut logits are used.

    alpha, beta, gamma:            weights of the losses (see losses/weights.py)
    divergence, temperature, tail: what VSD and RLD sum up (see losses/divergence.py)
                                   the tail auto is codes if the cache has them, else uniform
    matching: how pairs are found (see matching/match.py)
    cost, cost_top_k: what matching by logits compares (see matching/cost.py). The paper's cost is that of raw logits;
                      docs/demonstration.md says why the default is another
    top_k:    logits of a vision token to use; null uses all that are stored
    vision_share: share of the matched pairs that VSD takes at each step, at random; unbiased, with less to compute
    solver:   of assignments (see matching/assignment.py); each finds a least total cost
    """

    alpha: float = Field(default=0.5, ge=0, le=1)
    beta: float = Field(default=0.25, ge=0)
    gamma: float = Field(default=25.0, ge=0)
    divergence: Kind = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)
    tail: Literal["auto", "codes", "bucket", "uniform"] = "auto"
    matching: Matching = "logits"
    cost: Space = "log_probabilities"
    cost_top_k: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    vision_share: float = Field(default=1.0, gt=0, le=1)
    solver: Solver = "scipy"

    @model_validator(mode="after")
    def _temperature_has_a_tail(self) -> "LossRecipe":
        self.distance(has_codes=False)  # raises ValueError
        return self

    @property
    def weights(self) -> Weights:
        """The weights of the losses."""
        return Weights(alpha=self.alpha, beta=self.beta, gamma=self.gamma)

    def distance(self, *, has_codes: bool) -> Divergence:
        """Return the divergence that VSD and RLD sum up. has_codes: whether the cache has

        Raises ValueError if tail and temperature do not fit together.
        """
        tail: Tail = ("codes" if has_codes else "uniform") if self.tail == "auto" else self.tail
        return Divergence(kind=self.divergence, tail=tail, temperature=self.temperature)

    @property
    def compared(self) -> Cost:
        """What matching by logits compares."""
        return Cost(space=self.cost, top_k=self.cost_top_k)


class LoraRecipe(_Section):
    """LoRA (arXiv 2106.09685) in the linear layers below `modules`, whose own weights are frozen. Needs peft.

    r, alpha: rank and scale of the additions;  dropout: of the additions' inputs
    modules:  see StudentRecipe; embeddings and the LM head get no additions and are only frozen
    """

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    modules: tuple[Module, ...] = ("language_model", "lm_head")


class StudentRecipe(_Section):
    """The student's model.

    dtype:          of the weights. bfloat16 weights lose small updates: use training.bf16 (autocast) for speed
    vision_pool:    side of the window of vision tokens that are averaged into one; null leaves the student unchanged
    freeze:         modules that are not trained
    learning_rates: peak learning rate by module; of several that match a parameter, the one with the longest prefix
                    decides, and all other parameters have training.learning_rate
    lora:           null trains the weights themselves
    attn_implementation: of transformers (sdpa, eager, flash_attention_2, ...); null leaves the choice to it
    shard:          each worker keeps a part of the student, its gradients and optimizer state (FSDP2), not a copy

    Modules are vision_tower, projector, language_model or lm_head, in every family, or prefixes of parameter names.
    """

    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    vision_pool: int | None = Field(default=None, ge=1)
    freeze: tuple[Module, ...] = ()
    learning_rates: dict[Module, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    lora: LoraRecipe | None = None
    attn_implementation: Annotated[str, Field(min_length=1)] | None = None
    shard: bool = False


class Recipe(_Section):
    """The whole file.

    window:      shards that each loader worker decodes at a time, and whose samples are shuffled together
    max_skipped: share of the samples that may be skipped because the student cannot use them
    """

    losses: LossRecipe = LossRecipe()
    student: StudentRecipe = StudentRecipe()
    training: dict[str, Any] = Field(default_factory=dict)
    window: int = Field(default=2, ge=1)
    max_skipped: float = Field(default=0.01, ge=0, le=1)

    @property
    def save_on_signal(self) -> bool:
        """Whether SIGINT and SIGTERM save a checkpoint after the step in hand; if not, they end the run at once."""
        return bool(self.training.get("save_on_signal", OWN["save_on_signal"]))

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        return known_arguments(given)


_SECTIONS: dict[tuple[str, ...], type[_Section]] = {
    (): Recipe,
    ("losses",): LossRecipe,
    ("student",): StudentRecipe,
    ("student", "lora"): LoraRecipe,
}


class _EachKeyOnce(yaml.SafeLoader):
    """A YAML loader that refuses a key that occurs twice; SafeLoader would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(named: str | Path | None) -> Recipe:
    """Return the recipe of a file, or of emkd by its name, or the defaults for None. A file goes before a name.

    Raises InputNotFoundError if there is neither, UsageError if it is not a recipe.
    """
    if named is None:
        return Recipe()
    try:
        content = yaml.load(_recipe_text(named), _EachKeyOnce)  # noqa: S506  a safe loader
    except UnicodeDecodeError as error:
        raise UsageError(f"{named} is not UTF-8 ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{named} is not valid YAML: {error}") from error
    return make_recipe(content or {}, str(named))


def _recipe_text(named: str | Path) -> str:
    path = Path(named)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if str(named) in recipe_names():
        return recipe_text(str(named))
    what = "is a folder" if path.is_dir() else "does not exist"
    raise InputNotFoundError(f"--recipe {named} {what}; expected a YAML file or a name{which_recipes(path.name)}")


def make_recipe(content: Any, where: str) -> Recipe:
    """Return the recipe of a mapping read from `where`. Raises UsageError that lists every wrong key and value."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: " + "; ".join(_explain(dict(e)) for e in error.errors())) from error


def with_flags(recipe: Recipe, flags: dict[str, Any]) -> Recipe:
    """Return the recipe overridden by the flags that are not None, by dotted name such as `losses.alpha`.

    Raises UsageError for a wrong value.
    """
    content = recipe.model_dump()
    if flags.get("training.num_train_epochs") is not None:
        content["training"].pop("max_steps", None)  # which would override the number of epochs
    for name, value in flags.items():
        if value is None:
            continue
        *sections, last = name.split(".")
        found = content
        for section in sections:
            found = found[section]
        found[last] = value
    return make_recipe(content, "command line")


_WANTED = {
    "model_type": "a mapping of names to values",
    "dict_type": "a mapping of names to values",
    "tuple_type": "a list",
}


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the recipe"
    if error["type"] == "extra_forbidden":
        name, section = str(error["loc"][-1]), _SECTIONS[error["loc"][:-1]]
        if name in TYPES or name in OWN:
            return f"unknown key {where!r}; it belongs in the section `training`"
        return f"unknown key {where!r}{nearest(name, list(section.model_fields))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in _WANTED:
        return f"{where}: must be {_WANTED[error['type']]}, got {error['input']!r}"
    return f"{where}: {error['msg']}, got {error['input']!r}"
