"""The basis of a cache's codes, fitted to the hidden states of a few rows (docs/method.md, "Codes").

    hidden states --Moments--> mean, covariance --Spectrum.of--> columns, and what dropping some of them costs
        --at_error--> Basis with a step, columns and a predicted error

A code has r integers q = round((h - m) P / step), and h is read back as m + step q R^T. P and R are principal
components in the metric of the LM head: with G = W^T W / V for its rows W below V, M = G + mu I and L L^T = M, the
eigenvectors Q of L^T cov(h) L give P = L Q and R = L^-T Q. Then the mean square error of a logit is

    step^2 / 12 * sum of g over the kept columns + what the dropped columns held,      g = diag(R^T G R)

the first term for rounding errors that are spread evenly over a step, which is an upper bound for columns that vary
less than a step. The second term is measured on rows that the columns were not fitted to.

If the model multiplies logits after its head, W and b are taken times that scale. A softcap is applied when logits are
read; as tanh has a slope of at most 1, it changes no logit's error for the worse, and the prediction is an upper bound.

Shape legend: n tokens, d hidden size, V ids, r columns
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emkd.errors import UsageError
from emkd.storage.basis import Basis
from emkd.vlm.after_head import NOTHING, AfterHead

# mu, as a multiple of the mean eigenvalue of G.
RIDGE = 1.6
# Dropping columns may cost at most this share of the mean square error.
DROPPED = 0.5
# Bits that a column counts on top of its entropy, for the time that it takes to read and to multiply.
COLUMN_BITS = 0.05
# Rows of the head that are multiplied at a time.
ROWS = 1 << 14
# Groups of columns are half an octave of spread wide, down to this many below a spread of one step.
HALF_OCTAVES_BELOW = 6
LARGEST_HALF = 65504.0


@dataclass
class Moments:
    """Sums over hidden states, in float64: n, sum of h [d], sum of h h^T [d, d]."""

    n: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, hidden: torch.Tensor) -> "Moments":
        """Return the moments of hidden states [n, d]."""
        states = hidden.double()
        return cls(n=len(states), total=states.sum(dim=0), outer=states.T @ states)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(n=self.n + other.n, total=self.total + other.total, outer=self.outer + other.outer)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.n

    def covariance(self, mean: torch.Tensor) -> torch.Tensor:
        """Return the mean of (h - mean) (h - mean)^T."""
        cross = torch.outer(self.mean, mean)
        return self.outer / self.n - cross - cross.T + torch.outer(mean, mean)


def head_metric(weight: torch.Tensor) -> torch.Tensor:
    """Return G = W^T W / V in float64 from the head's rows W [V, d]."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(ROWS):
        total += rows.float().T @ rows.float()
    return total / len(weight)


@dataclass(frozen=True)
class Spectrum:
    """All d columns, by descending variance, and what they hold.

    mean: [d];  projection, reconstruction: P, R [d, d];  variance: [d] of the coefficients
    gain: g [d];  dropped: [d + 1] mean square error of a logit if the columns from each one on are dropped, of the
    worse half
    """

    mean: torch.Tensor
    projection: torch.Tensor
    reconstruction: torch.Tensor
    variance: torch.Tensor
    gain: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def of(cls, halves: Sequence[Moments], metric: torch.Tensor) -> "Spectrum":
        """Return the spectrum of all hidden states.

        halves: of different rows: what columns fitted to each half lose on the other is what dropping is taken to cost.
                One part alone says nothing about other rows, so that no column may be dropped
        """
        ridge = RIDGE * metric.trace() / len(metric)
        factor = torch.linalg.cholesky(
            metric + ridge * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        )
        whole = halves[0]
        for half in halves[1:]:
            whole = whole + half
        projection, reconstruction, variance = _components(whole, factor)
        losses = [torch.full((len(metric) + 1,), torch.inf, dtype=metric.dtype, device=metric.device)]
        losses[0][-1] = 0
        if len(halves) == 2:
            first, second = halves
            losses = [_lost(first, second, factor, metric), _lost(second, first, factor, metric)]
        return cls(
            mean=whole.mean,
            projection=projection,
            reconstruction=reconstruction,
            variance=variance,
            gain=_gain(reconstruction, metric),
            dropped=torch.stack(losses).amax(dim=0),
        )

    def at_error(self, error: float, most_columns: int) -> "Cut":
        """Return the columns and the step for which the predicted root mean square error of a logit is `error`.

        More columns allow a larger step: of all numbers of columns that reach the error, it takes the one with the
        fewest estimated bits. Raises UsageError if `most_columns` do not reach it.
        """
        most = min(most_columns, len(self.gain))
        reaching = (self.dropped[1 : most + 1] <= DROPPED * error**2).nonzero()[:, 0] + 1
        if not len(reaching):
            raise UsageError(
                f"a logit error of {error:g} takes more than the {most} columns that the memory limit of the projected "
                "LM head allows; use a larger --logit-error, or a larger --head-memory"
            )
        squared_step = 12 * (error**2 - self.dropped[reaching]) / self.gain.cumsum(0)[reaching - 1]
        bits = [self._bits(n, float(step)) for n, step in zip(reaching.tolist(), squared_step, strict=True)]
        best = int(np.argmin(bits))
        return Cut(n_columns=int(reaching[best]), step=float(squared_step[best].sqrt()), error=error)

    def _bits(self, n_columns: int, squared_step: float) -> float:
        """Estimated bits of a token: the entropy of rounded normal numbers of these variances, for small ones more."""
        ratio = 2 * math.pi * math.e * self.variance[:n_columns] / squared_step
        return float((1 + ratio).log2().sum() / 2) + COLUMN_BITS * n_columns

    def least_error(self, most_columns: int) -> float:
        """Return the smallest error that so many columns allow, 0 if they are all."""
        return float((self.dropped[min(most_columns, len(self.gain))] / DROPPED).clamp(min=0).sqrt())

    def groups(self, cut: "Cut") -> tuple[int, ...]:
        """Return numbers of neighbouring columns of similar spread."""
        spread = self.variance[: cut.n_columns].clamp(min=1e-300).sqrt() / cut.step
        octave = (2 * spread.log2()).floor().clamp(min=-HALF_OCTAVES_BELOW)
        return tuple(torch.unique_consecutive(octave, return_counts=True)[1].tolist())

    def basis(self, cut: "Cut", weight: torch.Tensor, bias: torch.Tensor | None, after: AfterHead = NOTHING) -> Basis:
        """Return the basis. weight, bias: the head's rows below V, [V, d] and [V];  after: what follows it

        Raises UsageError if a number of the projected head does not fit into float16.
        """
        mean, used = self.mean.float(), slice(cut.n_columns)
        reconstruction = self.reconstruction[:, used].float()
        offset = torch.cat([rows.float() @ mean for rows in weight.split(ROWS)])
        head = torch.cat([rows.float() @ reconstruction for rows in weight.split(ROWS)]) * after.scale
        if not bool((head.abs() <= LARGEST_HALF).all()):
            raise UsageError("the projected LM head does not fit into float16; use --logit-error none")
        return Basis(
            mean=_array(mean),
            projection=_array(self.projection[:, used].float()),
            reconstruction=_array(reconstruction),
            head=_array(head.half()),
            offset=_array(after.scale * (offset if bias is None else offset + bias.float())),
            groups=self.groups(cut),
            step=cut.step,
            logit_error=cut.error,
            cap=after.cap,
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How many columns are kept, the step of their integers, and the predicted root mean square error of a logit."""

    n_columns: int
    step: float
    error: float


def _components(moments: Moments, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(P, R, variances) of all columns, by descending variance. factor: L"""
    covariance = factor.T @ moments.covariance(moments.mean) @ factor
    variance, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    vectors, variance = vectors.flip(1), variance.flip(0).clamp(min=0)
    return factor @ vectors, torch.linalg.solve_triangular(factor.T, vectors, upper=True), variance


def _gain(reconstruction: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    return (reconstruction * (metric @ reconstruction)).sum(dim=0)


def _lost(half: Moments, other: Moments, factor: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """[d + 1] mean square error of a logit on the `other` rows if columns fitted to `half` are dropped from each on."""
    projection, reconstruction, _ = _components(half, factor)
    coefficients = projection.T @ other.covariance(half.mean) @ projection
    products = (reconstruction.T @ metric @ reconstruction) * coefficients
    # Sums over the lower right blocks of `products`.
    sums = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([sums, sums.new_zeros(1)]).clamp(min=0)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())
