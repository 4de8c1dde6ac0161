"""What a user chooses for a student's run."""

from dataclasses import dataclass
from pathlib import Path

from emkd.trainer.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The arguments of `emkd train-student`; `recipe` has the command line's flags in it already.

    cache:   may be left out where all three distillation weights are off (α = 1, β = γ = 0)
    workers: processes that train together, each with a GPU where there are any; more than one by Ray Train
    address: of a Ray cluster for them; None starts one of our own
    """

    student: str
    data: str
    output: Path
    recipe: Recipe
    cache: str | None = None
    image_root: Path | None = None
    eval_data: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    partial: bool = False
    resume: bool = False
    workers: int = 1
    address: str | None = None
