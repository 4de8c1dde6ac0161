"""How logits and affinity are rounded for the disk, and read back.

    logits     bfloat16   upper half of the float32 bits, as uint16 (Zarr v3 has no bfloat16); relative
                          error at most 2**-8 (normal numbers)
               float16    IEEE half
               float32    exact
               step0.1    multiples of 0.1, as int16; absolute error at most 0.05
               step0.2    multiples of 0.2, as int16; absolute error at most 0.1
    affinity   int8       round(127 a); absolute error at most 1/254
               float16    IEEE half
               float32    exact

All rounding is to nearest, ties to even; zeros lose their sign. Nothing else changes silently: NaN, a finite logit that
would become infinite or that exceeds the largest multiple, and an affinity that is not a cosine raise ValueError.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

LogitsPrecision = Literal["bfloat16", "float16", "float32", "step0.1", "step0.2"]
AffinityPrecision = Literal["int8", "float16", "float32"]

# Cosines computed in low precision may slightly exceed 1. Up to this much is rounding; more is a bug.
COSINE_TOLERANCE = 1e-3

# The step of each precision that rounds logits to multiples.
STEPS = {"step0.1": 0.1, "step0.2": 0.2}

_LOGITS_DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32} | dict.fromkeys(STEPS, np.int16)
_AFFINITY_DTYPES = {"int8": np.int8, "float16": np.float16, "float32": np.float32}


def logits_dtype(precision: LogitsPrecision) -> np.dtype[Any]:
    """Return the type of logits on disk. Raises ValueError if the precision does not exist."""
    return _dtype(_LOGITS_DTYPES, precision, "logits", get_args(LogitsPrecision))


def affinity_dtype(precision: AffinityPrecision) -> np.dtype[Any]:
    """Return the type of affinity on disk. Raises ValueError if the precision does not exist."""
    return _dtype(_AFFINITY_DTYPES, precision, "affinity", get_args(AffinityPrecision))


def encode_logits(logits: NDArray[np.float32], precision: LogitsPrecision) -> NDArray[Any]:
    """Round float32 logits of any shape to the type on disk: `logits_dtype`, for bfloat16 the upper 16 bits.

    Infinities stay infinite if the precision has infinities. Raises ValueError if a logit is NaN or does not fit.
    """
    values = np.ascontiguousarray(logits, dtype=np.float32) + np.float32(0)  # -0 becomes 0
    if np.isnan(values).any():
        raise ValueError(f"logits: {int(np.isnan(values).sum())} of {values.size} are NaN; check the teacher's output")
    if precision in STEPS:
        return _multiples(values, precision)
    if precision == "float32":
        return values
    if precision == "bfloat16":
        stored = _bfloat16_bits(values)
        stored[stored == 0x8000] = 0  # -0: rounded from less than half of the smallest negative number
        became_infinite = (stored & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):  # _refuse names the value below
            stored = values.astype(logits_dtype(precision))
        became_infinite = np.isinf(stored)
    if became_infinite.any():
        _refuse(values, became_infinite & np.isfinite(values), f"{precision} and would become infinite")
    return stored + stored.dtype.type(0) if precision == "float16" else stored


def _multiples(values: NDArray[np.float32], precision: str) -> NDArray[np.int16]:
    multiples = np.rint(values / np.float32(STEPS[precision]))
    _refuse(values, ~(np.abs(multiples) <= np.iinfo(np.int16).max), f"{precision}, which ends at multiple 32767")
    return multiples.astype(np.int16)


def _refuse(values: NDArray[np.float32], wrong: NDArray[np.bool_], why: str) -> None:
    if wrong.any():
        raise ValueError(
            f"logits: {float(values[wrong].flat[0]):g} does not fit in {why} "
            f"({int(wrong.sum())} of {values.size} values); store them as bfloat16 or float32"
        )


def decode_logits(stored: NDArray[Any], precision: LogitsPrecision) -> NDArray[np.float32]:
    """Decode the output of encode_logits to float32 of the same shape (a new array, except for float32).

    Raises ValueError if `stored` does not have the type of the precision.
    """
    dtype = logits_dtype(precision)
    if stored.dtype != dtype:
        raise ValueError(f"logits of precision {precision} are stored as {dtype}, got {stored.dtype}")
    if precision == "bfloat16":
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if precision in STEPS:
        return stored * np.float32(STEPS[precision])
    return stored.astype(np.float32, copy=False)


def round_logits(logits: NDArray[np.float32], precision: LogitsPrecision) -> NDArray[np.float32]:
    """Round float32 logits of any shape as storing and reading them does. Raises as encode_logits."""
    return decode_logits(encode_logits(logits, precision), precision)


def encode_affinity(affinity: NDArray[np.float32], precision: AffinityPrecision) -> NDArray[Any]:
    """Round cosines of any shape to the type on disk: `affinity_dtype`.

    Raises ValueError if a value is NaN or further than COSINE_TOLERANCE outside [-1, 1]. int8 clips values within the
    tolerance to [-1, 1]; the other types store them unclipped.
    """
    dtype = affinity_dtype(precision)
    values = np.ascontiguousarray(affinity, dtype=np.float32)
    if values.size:
        low, high = float(values.min()), float(values.max())
        if not (low >= -1 - COSINE_TOLERANCE and high <= 1 + COSINE_TOLERANCE):  # NaN fails both
            raise ValueError(
                f"affinity: values from {low:g} to {high:g}; expected cosines, within [-1, 1] up to "
                f"{COSINE_TOLERANCE:g} of rounding; normalise the hidden states first"
            )
    if precision == "int8":
        scaled = values * np.float32(127)
        return np.clip(np.rint(scaled, out=scaled), -127, 127, out=scaled).astype(np.int8)
    return values.astype(dtype, copy=False)


def decode_affinity(stored: NDArray[Any], precision: AffinityPrecision) -> NDArray[np.float32]:
    """Decode the output of encode_affinity to float32 of the same shape (a new array, except for float32).

    Raises ValueError if `stored` does not have the type of the precision.
    """
    dtype = affinity_dtype(precision)
    if stored.dtype != dtype:
        raise ValueError(f"affinity of precision {precision} is stored as {dtype}, got {stored.dtype}")
    if precision == "int8":
        return np.divide(stored, np.float32(127), dtype=np.float32)
    return stored.astype(np.float32, copy=False)


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the upper 16 bits, to nearest even. Values must not be NaN: the carry would make them infinite."""
    bits = values.view(np.uint32)
    carry = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + carry) >> 16).astype(np.uint16)


def _dtype(known: dict[str, Any], precision: str, what: str, choices: tuple[str, ...]) -> np.dtype[Any]:
    if precision not in known:
        raise ValueError(f"{what} precision {precision!r}; expected one of {', '.join(choices)}")
    return np.dtype(known[precision])
