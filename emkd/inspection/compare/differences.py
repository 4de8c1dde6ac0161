"""How much a live teacher differs from what a cache holds of the same sample.

The rounding error of each stored value is bounded: half a unit in the last place of a logit, 1/254 of an affinity in 8
bits. A difference up to that bound counts as zero. The rest is *beyond rounding*, and `emkd.vlm.tolerance` judges it.

Shape legend: n tokens, k stored logits, V ids, L text tokens, Nt vision tokens
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from emkd.errors import SampleError
from emkd.storage.arrays.layout import TOKEN_AXES, TokenAxis
from emkd.storage.precision import STEPS, AffinityPrecision, LogitsPrecision
from emkd.storage.record import Record
from emkd.vlm.affinity import affinity
from emkd.vlm.codes import NOT_FINITE, Codes
from emkd.vlm.states import States
from emkd.vlm.truncated import TruncatedLogits

# Bits of the significand, the leading one included, and the smallest exponent (of torch.frexp) of normal numbers.
SIGNIFICAND = {"bfloat16": (8, -125), "float16": (11, -13)}
# Largest rounding error of an affinity on disk.
AFFINITY_ROUNDING = {"int8": 1 / 254, "float16": 2.0**-12, "float32": 0.0}


@dataclass
class Difference:
    """Absolute differences of one quantity, accumulated over samples.

    largest, total: |live - stored|
    beyond, total_beyond: the part of it that the disk's rounding does not explain
    worst: the sample number with the largest difference beyond rounding (or the largest of all, if there is none)
    """

    n: int = 0
    largest: float = 0.0
    total: float = 0.0
    beyond: float = 0.0
    total_beyond: float = 0.0
    worst: int | None = None

    @property
    def mean(self) -> float:
        return self.total / max(1, self.n)

    @property
    def mean_beyond(self) -> float:
        return self.total_beyond / max(1, self.n)

    def add(self, difference: torch.Tensor, rounding: torch.Tensor | float, sample: int) -> None:
        """Add the differences of one sample. Raises SampleError if one is not finite.

        difference: absolute values of any shape
        rounding:   of the same shape, or one number: an upper bound of the part that the disk explains
        """
        if not difference.numel():
            return
        if not bool(difference.isfinite().all()):
            raise SampleError(
                NOT_FINITE, "the difference between the live teacher's answer and the cache is not finite"
            )
        beyond = (difference - rounding).clamp(min=0)
        largest, largest_beyond = float(difference.max()), float(beyond.max())
        if self.worst is None or (largest_beyond, largest) > (self.beyond, self.largest):
            self.worst = sample
        self.n += difference.numel()
        self.largest, self.beyond = max(self.largest, largest), max(self.beyond, largest_beyond)
        self.total += float(difference.sum(dtype=torch.float64))
        self.total_beyond += float(beyond.sum(dtype=torch.float64))


@dataclass
class Scale:
    """Root mean square of accumulated numbers: the size that differences of logits are measured against.

    It takes the cache's numbers, so that a wrong teacher with large logits cannot widen its own tolerance.
    """

    n: int = 0
    total: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        self.n += values.numel()
        self.total += float(values.double().square().sum())

    @property
    def value(self) -> float:
        return float((self.total / max(1, self.n)) ** 0.5)


@dataclass
class TokenDifferences:
    """The differences of one kind of tokens, vision or answer.

    logits:         at the stored ids
    order:          how much the largest live logit that is not stored exceeds the smallest stored one of its token, 0
                    if it does not: whether the stored ids are the k largest
    tail_logsumexp, tail_mean: of the tail (answers have no mean; neither exists if k = V)
    scale:          of the stored logits;  tail_scale: of the level of the tail
    """

    logits: Difference = field(default_factory=Difference)
    order: Difference = field(default_factory=Difference)
    tail_logsumexp: Difference = field(default_factory=Difference)
    tail_mean: Difference = field(default_factory=Difference)
    scale: Scale = field(default_factory=Scale)
    tail_scale: Scale = field(default_factory=Scale)

    def named(self) -> Iterator[tuple[str, Difference]]:
        for name in ("logits", "order", "tail_logsumexp", "tail_mean"):
            yield name, getattr(self, name)

    def add(self, live: torch.Tensor, stored: TruncatedLogits, precision: LogitsPrecision, sample: int) -> None:
        """Add tokens. live: float32 logits [n, V] of the tokens that `stored` has"""
        rounding = half_unit(stored.logits, precision)
        self.logits.add((live.gather(1, stored.ids) - stored.logits).abs(), rounding, sample)
        self.scale.add(stored.logits)
        n_tail = live.shape[1] - stored.ids.shape[1]
        if not n_tail:
            return
        rest = live.scatter(1, stored.ids, -torch.inf)
        self.order.add((rest.amax(1) - stored.logits[:, -1]).clamp(min=0), rounding[:, -1], sample)
        self.tail_logsumexp.add((rest.logsumexp(1) - stored.tail_logsumexp).abs(), 0.0, sample)
        level = stored.tail_logsumexp - torch.tensor(n_tail).log()
        if stored.tail_mean is not None:
            level = stored.tail_mean
            mean = live.scatter(1, stored.ids, 0.0).sum(1) / n_tail
            self.tail_mean.add((mean - level).abs(), 0.0, sample)
        self.tail_scale.add(level)


@dataclass
class StateDifferences:
    """The differences of hidden states of one kind of tokens, in the columns of the codes' basis.

    scale: of the stored columns
    """

    difference: Difference = field(default_factory=Difference)
    scale: Scale = field(default_factory=Scale)

    def add(self, hidden: torch.Tensor, stored: torch.Tensor, codes: Codes, sample: int) -> None:
        """Add tokens. hidden: live states [n, d];  stored: their codes [n, r]"""
        kept = stored.float() * codes.step
        self.difference.add((codes.coefficients(hidden) - kept).abs(), codes.step / 2, sample)
        self.scale.add(kept)


@dataclass
class Differences:
    """The differences of all quantities, over the samples that were added.

    vocabulary: V;  precision, affinity_precision: what the cache stores
    codes: the basis of its codes, None if it has none
    """

    vocabulary: int
    precision: LogitsPrecision
    affinity_precision: AffinityPrecision
    codes: Codes | None = None
    vision: TokenDifferences = field(default_factory=TokenDifferences)
    answer: TokenDifferences = field(default_factory=TokenDifferences)
    states: dict[TokenAxis, StateDifferences] = field(
        default_factory=lambda: {tokens: StateDifferences() for tokens in TOKEN_AXES}
    )
    affinity: Difference = field(default_factory=Difference)

    @torch.inference_mode()
    def add(
        self, states: States, record: Record, logits: Callable[[torch.Tensor], torch.Tensor], chunk: int, sample: int
    ) -> None:
        """Add one sample. logits: [n, d] -> float32 [n, V];  chunk: tokens whose logits exist at a time"""
        device = states.vision.device
        kinds: Any = (
            (self.vision, states.vision, TruncatedLogits.of(record.vision, self.vocabulary).to(device)),
            (self.answer, states.predicting, TruncatedLogits.of(record.answer, self.vocabulary).to(device)),
        )
        for found, hidden, stored in kinds:
            for start in range(0, len(hidden), chunk):
                rows = hidden[start : start + chunk]
                found.add(logits(rows), stored.rows(slice(start, start + chunk)), self.precision, sample)
        coded: tuple[tuple[TokenAxis, torch.Tensor, Any], ...] = (
            ("text", states.text, record.text_codes),
            ("vision", states.vision, record.vision.codes),
            ("answer", states.predicting, record.answer.codes),
        )
        for tokens, hidden, codes in coded:
            if codes is not None and self.codes is not None:
                self.states[tokens].add(hidden, torch.from_numpy(codes).to(device), self.codes, sample)
        if record.affinity is not None:
            live = affinity(states.text, states.vision)
            kept = torch.from_numpy(record.affinity).to(device)
            self.affinity.add((live - kept).abs(), AFFINITY_ROUNDING[self.affinity_precision], sample)

    def scale(self, name: str) -> float:
        """Return the size that a quantity of `named` is measured against."""
        if name == "affinity":
            return 1.0
        if name.endswith("_codes"):
            return next(found.scale.value for tokens, found in self.states.items() if name == f"{tokens}_codes")
        tokens = self.vision if name.startswith("vision") else self.answer
        return max(tokens.scale.value, tokens.tail_scale.value)

    def named(self) -> Iterator[tuple[str, Difference]]:
        """Yield the quantities that have numbers: "vision_logits", ..., "answer_tail_logsumexp", "vision_codes", ...,
        "affinity"."""
        for kind in ("vision", "answer"):
            for name, difference in getattr(self, kind).named():
                if difference.n:
                    yield f"{kind}_{name}", difference
        for tokens, states in self.states.items():
            if states.difference.n:
                yield f"{tokens}_codes", states.difference
        if self.affinity.n:
            yield "affinity", self.affinity


def half_unit(stored: torch.Tensor, precision: LogitsPrecision) -> torch.Tensor:
    """Return half a unit in the last place of stored logits [n, k]: the largest error of rounding to nearest."""
    if precision == "float32":
        return torch.zeros_like(stored)
    if precision in STEPS:
        # And the rounding of float32 itself, in the quotient and in the product.
        return torch.full_like(stored, STEPS[precision] / 2) + 2.0**-22 * stored.abs()
    bits, smallest = SIGNIFICAND[precision]
    exponent = torch.frexp(stored).exponent.masked_fill(stored == 0, smallest).clamp(min=smallest)
    return torch.ldexp(torch.ones_like(stored), exponent - bits - 1)
