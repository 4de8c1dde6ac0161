"""Figures of a comparison with the dense teacher that add up over images: an assignment, and a loss with its gradient.

The parts of a ratio are summed, not the ratios.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Total dense distances of three assignments, summed over images.

    found: the assignment found from the cut teacher;  best: the optimum;  random: the expectation of a random one
    """

    found: float
    best: float
    random: float

    def __add__(self, other: "Assignment") -> "Assignment":
        return Assignment(
            found=self.found + other.found, best=self.best + other.best, random=self.random + other.random
        )

    @property
    def regret(self) -> float:
        """How far the found assignment is from the best (0) towards a random one (1); 0 if all are equally good."""
        return 0.0 if self.found == self.best else (self.found - self.best) / (self.random - self.best)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A loss and its gradient from the cut teacher and from the dense teacher, summed over tokens.

    n: number of summands, tokens (VSD, RLD) or images (VLAD)
    cut, dense: the losses
    dot, cut_squared, dense_squared: inner products of the gradients
    """

    n: int
    cut: float
    dense: float
    dot: float
    cut_squared: float
    dense_squared: float

    @classmethod
    def of(cls, n: int, cut: tuple[float, torch.Tensor], dense: tuple[float, torch.Tensor]) -> "Comparison":
        """Compare the (loss, gradient) of each side; the gradients have one shape."""
        ours, theirs = cut[1].double().flatten(), dense[1].double().flatten()
        return cls(
            n=n,
            cut=cut[0],
            dense=dense[0],
            dot=float(ours @ theirs),
            cut_squared=float(ours @ ours),
            dense_squared=float(theirs @ theirs),
        )

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def loss_error(self) -> float:
        """(cut - dense) / dense: negative if the cut loss is too small. NaN for a loss of 0."""
        return (self.cut - self.dense) / self.dense if self.dense else float("nan")

    @property
    def gradient_cosine(self) -> float:
        """Cosine of the two gradients. NaN if one of them is 0."""
        norms = (self.cut_squared * self.dense_squared) ** 0.5
        return self.dot / norms if norms else float("nan")

    @property
    def gradient_norm_ratio(self) -> float:
        """|cut| / |dense|. NaN for a dense gradient of 0."""
        return float((self.cut_squared / self.dense_squared) ** 0.5) if self.dense_squared else float("nan")

    def as_dict(self) -> dict[str, float]:
        """Return {loss, loss_error, gradient_cosine, gradient_norm_ratio}; loss is the mean dense loss.

        NaN if `n` is 0 or a loss vanishes.
        """
        return {
            "loss": self.dense / self.n if self.n else float("nan"),
            "loss_error": self.loss_error,
            "gradient_cosine": self.gradient_cosine,
            "gradient_norm_ratio": self.gradient_norm_ratio,
        }
