"""The divisors of an optimizer step's losses, over all its micro-batches and ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many items a step, or a part of it, has.

    answers:        answer tokens (Sup, RLD)
    pairs:          matched pairs of vision tokens (VSD)
    vision_samples: samples that have pairs (VLAD)
    """

    answers: int
    pairs: int
    vision_samples: int

    @staticmethod
    def total(parts: Iterable["Counts"]) -> "Counts":
        """Return the sum of the parts."""
        return Counts.from_tensor(sum((part.as_tensor() for part in parts), torch.zeros(3, dtype=torch.int64)))

    def as_tensor(self) -> torch.Tensor:
        """Return [3] int64, to be summed over ranks; `from_tensor` undoes it."""
        return torch.tensor([self.answers, self.pairs, self.vision_samples])

    @staticmethod
    def from_tensor(counts: torch.Tensor | Sequence[int]) -> "Counts":
        """Return the counts of [3] numbers."""
        answers, pairs, vision_samples = (int(n) for n in counts)
        return Counts(answers=answers, pairs=pairs, vision_samples=vision_samples)
