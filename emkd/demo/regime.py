"""The conditions under which the demonstration distils. The benchmarks take each of them away in turn."""

from dataclasses import dataclass
from typing import Any

from emkd.demo.teacher import NAME
from emkd.demo.variants import RECIPE

ALIGN_SCENES, TRAIN_SCENES, EVALUATION_SCENES = 200, 400, 300
TOP_K = 8  # of 23 words: a cut cache, as real ones are
ROWS_PER_SHARD = 100


@dataclass(frozen=True, kw_only=True)
class Regime:
    """questions:     of each training scene in phase 2; scenes have 8 cells
    wrong_answers: the share of phase 2's answers that are wrong
    naming:        weight of the loss by which the teacher's vision tokens learn to name what they show
    name:          of a vision token's probability, the share that is for the word of what it shows; the rest is for the
                   question that asks for its cell
    aligned:       the student's processor pads as the teacher's does, so that their grids coincide
    beta:          weight of VSD
    """

    questions: int = 1
    wrong_answers: float = 0.25
    naming: float = 1.0
    name: float = NAME
    aligned: bool = False
    beta: float = RECIPE["losses"]["beta"]

    def flags(self, losses: dict[str, Any]) -> dict[str, Any]:
        """Return overrides of RECIPE for a variant's losses."""
        return {f"losses.{name}": value for name, value in ({"beta": self.beta} | losses).items()}


DEMO = Regime()
