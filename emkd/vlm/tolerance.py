"""How much a live teacher may differ from its cache before it counts as another teacher.

A teacher never gives exactly the same numbers twice: kernels, batches, devices and versions add them in another order.
The effect is proportional to the unit roundoff u of the teacher's dtype and to the size of its logits, so differences
are measured in both:

    mean     at most  8 u · scale
    largest  at most 64 u · scale        half of both for the tails, which average over many ids

u is 2⁻⁸ in bfloat16 and 2⁻¹¹ in float16. In float32 it is also 2⁻¹¹: GPUs compute convolutions in float32 as TF32
unless that is switched off, and a cache does not record the device that it was made on. scale is the root mean square
of the stored logits of vision or of answer tokens, or of the level of their tail if that is larger; 1 for affinities.
Rounding on disk is not part of it: it is subtracted from each difference first
(emkd/inspection/compare/differences.py).

The constants are measured (benchmarks/fidelity/tolerance.py): with 2 to 48 layers of random weights, other batches,
another attention implementation and more or less exact arithmetic use at most 0.4 of the tolerance, which leaves a
factor of 2.5 for models that were not measured; another seed exceeds the tolerance of the mean 30 times and more. In
between, weights that are off by 0.3% are noticed in float32 and float16, by 3% in bfloat16 (1% with 24 layers or more);
smaller changes may go unnoticed.
"""

from dataclasses import dataclass

from emkd.errors import UsageError

UNIT = {"float32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
MEAN, LARGEST = 8, 64
TAIL = 0.5


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Upper bounds of the mean and of the largest absolute difference beyond rounding."""

    mean: float
    largest: float


def tolerance(quantity: str, dtype: str, scale: float) -> Tolerance:
    """Return the tolerance of a quantity of `Differences.named`.

    dtype: of the teacher;  scale: the size of its logits (affinity: 1)

    Raises UsageError for a dtype without measurements.
    """
    if dtype not in UNIT:
        raise UsageError(
            f"the cache's teacher ran in {dtype}; emkd knows how much a live teacher may differ only in "
            f"{', '.join(UNIT)}"
        )
    step = UNIT[dtype] * scale * (TAIL if "tail" in quantity else 1)
    return Tolerance(mean=MEAN * step, largest=LARGEST * step)
