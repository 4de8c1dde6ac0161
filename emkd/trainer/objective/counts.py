"""What the sums of an optimizer step are divided by, over all its micro-batches and ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the sums of an optimizer step are divided by."""

    answers: int
    pairs: int
    vision_samples: int

    @staticmethod
    def total(parts: Iterable["Counts"]) -> "Counts":
        return Counts.from_tensor(sum((part.as_tensor() for part in parts), torch.zeros(3, dtype=torch.int64)))

    def as_tensor(self) -> torch.Tensor:
        return torch.tensor([self.answers, self.pairs, self.vision_samples])

    @staticmethod
    def from_tensor(counts: torch.Tensor | Sequence[int]) -> "Counts":
        answers, pairs, vision_samples = (int(n) for n in counts)
        return Counts(answers=answers, pairs=pairs, vision_samples=vision_samples)
