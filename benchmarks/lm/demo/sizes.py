"""How much is trained: on one CPU core, with the first layers only, and on a GPU, with all of them."""

from dataclasses import asdict, dataclass
from typing import Any

WHOLE = 30  # layers of SmolLM2-135M


@dataclass(frozen=True, kw_only=True)
class Size:
    """layers:        of the language model, counted from the embeddings
    tower_steps:      of the teacher's tower, 16 pictures each; projector_steps follow, then at most lookup_steps with
                      each of two, four and eight cells, and then language_steps
    scenes:           how many pictures phase 1, phase 2 and the accuracy have
    steps:            of phase 1 and phase 2
    lookup_batch, language_batch: rows and pictures of the teacher's lookup and language steps
    batch:            pictures of each step of both phases
    rates:            peak learning rates of the teacher's lookup, its language steps, phase 1 and phase 2
    seeds:            of phase 2, unless the command says otherwise
    """

    name: str
    layers: int
    tower_steps: int
    projector_steps: int
    lookup_steps: int
    language_steps: int
    scenes: tuple[int, int, int]
    steps: tuple[int, int]
    lookup_batch: int
    language_batch: int
    batch: int
    rates: tuple[float, float, float, float]
    seeds: int

    def figures(self) -> dict[str, Any]:
        """Return everything for the results, and how much of the language model is there."""
        return {**asdict(self), "layers_of_the_model": WHOLE, "whole": self.layers == WHOLE}

    def describe(self) -> str:
        """Return one line for the table."""
        if self.layers == WHOLE:
            return f"--size {self.name}: all {WHOLE} layers of SmolLM2-135M"
        return f"--size {self.name}: the first {self.layers} of {WHOLE} layers of SmolLM2-135M, so not the whole model"


SIZES = {
    "cpu": Size(
        name="cpu",
        layers=2,
        tower_steps=300,
        projector_steps=100,
        lookup_steps=150,
        lookup_batch=16,
        language_steps=80,
        scenes=(160, 480, 80),
        steps=(50, 90),
        language_batch=8,
        batch=8,
        rates=(1e-3, 5e-4, 1e-3, 2.5e-4),
        seeds=2,
    ),
    "gpu": Size(
        name="gpu",
        layers=WHOLE,
        tower_steps=600,
        projector_steps=300,
        lookup_steps=100,
        lookup_batch=32,
        language_steps=500,
        scenes=(400, 600, 150),
        steps=(100, 100),
        language_batch=16,
        batch=16,
        rates=(3e-4, 3e-4, 2e-4, 2e-4),
        seeds=1,
    ),
}
