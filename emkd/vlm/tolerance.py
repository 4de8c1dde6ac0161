"""How much a live teacher may differ from what its cache holds before it counts as another one.

A teacher never answers twice in quite the same way: kernels, batches, devices and versions add the same numbers in
another order. What that does is in proportion to the unit roundoff u of the teacher's dtype and to the size of its
logits, so that both are what a difference is measured in:

    mean     at most  8 u · scale
    largest  at most 64 u · scale        half of both for the tails, which average over many ids

u is 2⁻⁸ in bfloat16 and 2⁻¹¹ in float16. In float32 it is 2⁻¹¹, too: on a GPU convolutions in float32 are computed in
TF32 unless that is switched off, and a cache does not say on what it was made. scale is the root mean square of the
stored logits of vision or of answer tokens, or that of the level of those not stored where it is larger; 1 for
affinities. What the disk rounds is no part of this: it is taken off each difference beforehand (differences.py).

The constants are from benchmarks/fidelity/tolerance.py: with 2 to 48 layers of random weights, other batches, another
attention implementation and more or less exact arithmetic use at most 0.4 of what is tolerated, which leaves a factor
of 2.5 for models that nobody measured; another seed is 30 and more times what is tolerated in the mean. In between,
weights that are off by 0.3% are noticed in float32 and float16, by 3% in bfloat16 (1% with 24 layers or more); less may
go unnoticed.
"""

from dataclasses import dataclass

from emkd.errors import UsageError

UNIT = {"float32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
MEAN, LARGEST = 8, 64
TAIL = 0.5


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What the mean and the largest absolute difference beyond rounding may be."""

    mean: float
    largest: float


def tolerance(quantity: str, dtype: str, scale: float) -> Tolerance:
    """Of a quantity of `Differences.named`, for a teacher in this dtype and logits of this size (affinity: 1).

    Raises UsageError for a dtype that nothing is known of.
    """
    if dtype not in UNIT:
        raise UsageError(
            f"the cache's teacher ran in {dtype}; what differences that explains is known for {', '.join(UNIT)} alone"
        )
    step = UNIT[dtype] * scale * (TAIL if "tail" in quantity else 1)
    return Tolerance(mean=MEAN * step, largest=LARGEST * step)
