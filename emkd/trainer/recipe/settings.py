"""The arguments of `emkd train-student`."""

from dataclasses import dataclass
from pathlib import Path

from emkd.trainer.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The arguments of `emkd train-student`; `recipe` already contains the flags that override it.

    student:    name on the hub or folder;  revision: of that name
    data:       the dataset (see docs/data.md);  image_root: folder of its image paths
    follow_links: links inside that folder may lead out of it
    output:     folder for checkpoints and the trained student
    cache:      the teacher's cache; may be None if all distillation losses are off (α = 1, β = γ = 0)
    partial:    whether a cache that is not sealed may be used
    eval_data:  a dataset to evaluate on
    resume:     whether to resume from the last complete checkpoint in `output`
    workers:    processes that train together, each with a GPU if there are any; Ray Train starts more than one
    clock:      the date that the chat template writes, if it writes one and the cache does not keep it; None without a
                cache for today's
    address:    of a Ray cluster for the workers; None starts a local one
    """

    student: str
    data: str
    output: Path
    recipe: Recipe
    cache: str | None = None
    image_root: Path | None = None
    follow_links: bool = False
    eval_data: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    partial: bool = False
    resume: bool = False
    workers: int = 1
    address: str | None = None
    clock: str | None = None
