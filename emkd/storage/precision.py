"""How logits and affinity are rounded for the disk, and read back.

    logits     bfloat16   upper half of the float32 bits, as uint16 (Zarr v3 has no bfloat16); relative
                          error at most 2**-8 (normal numbers)
               float16    IEEE half
               float32    exact
    affinity   int8       round(127 a); absolute error at most 1/254
               float16    IEEE half
               float32    exact

All rounding is to nearest, ties to even. Nothing is changed in silence: NaN, a finite logit that would
become infinite, and an affinity that is no cosine are a ValueError.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

LogitsPrecision = Literal["bfloat16", "float16", "float32"]
AffinityPrecision = Literal["int8", "float16", "float32"]

# Cosines computed in low precision come out a hair beyond 1: this much is rounding, more is a mistake.
COSINE_TOLERANCE = 1e-3

_LOGITS_DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
_AFFINITY_DTYPES = {"int8": np.int8, "float16": np.float16, "float32": np.float32}


def logits_dtype(precision: LogitsPrecision) -> np.dtype[Any]:
    """Type of logits on disk. ValueError for a precision that does not exist."""
    return _dtype(_LOGITS_DTYPES, precision, "logits", get_args(LogitsPrecision))


def affinity_dtype(precision: AffinityPrecision) -> np.dtype[Any]:
    """Type of affinity on disk. ValueError for a precision that does not exist."""
    return _dtype(_AFFINITY_DTYPES, precision, "affinity", get_args(AffinityPrecision))


def encode_logits(logits: NDArray[np.float32], precision: LogitsPrecision) -> NDArray[Any]:
    """Round float32 logits of any shape to what is stored. Infinities stay; NaN and overflow: ValueError."""
    dtype = logits_dtype(precision)
    values = np.ascontiguousarray(logits, dtype=np.float32)
    if np.isnan(values).any():
        raise ValueError(f"logits: {int(np.isnan(values).sum())} of {values.size} are NaN; expected numbers")
    if precision == "float32":
        return values
    if precision == "bfloat16":
        stored = _bfloat16_bits(values)
        overflow = np.isfinite(values) & ((stored & 0x7FFF) == 0x7F80)
    else:
        with np.errstate(over="ignore"):  # reported below, with the value
            stored = values.astype(dtype)
        overflow = np.isfinite(values) & np.isinf(stored)
    if overflow.any():
        worst = values[overflow].flat[0]
        raise ValueError(
            f"logits: {float(worst):g} does not fit in {precision} and would become infinite "
            f"({int(overflow.sum())} of {values.size} values); store them as bfloat16 or float32"
        )
    return stored


def decode_logits(stored: NDArray[Any], precision: LogitsPrecision) -> NDArray[np.float32]:
    """What encode_logits stored, as float32 of the same shape (a new array, except for float32)."""
    dtype = logits_dtype(precision)
    if stored.dtype != dtype:
        raise ValueError(f"logits of precision {precision} are stored as {dtype}, got {stored.dtype}")
    if precision == "bfloat16":
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return stored.astype(np.float32, copy=False)


def round_logits(logits: NDArray[np.float32], precision: LogitsPrecision) -> NDArray[np.float32]:
    """What comes back when float32 logits of any shape are stored and read. Errors as encode_logits."""
    return decode_logits(encode_logits(logits, precision), precision)


def encode_affinity(affinity: NDArray[np.float32], precision: AffinityPrecision) -> NDArray[Any]:
    """Round cosines of any shape to what is stored.

    ValueError for NaN and for values further than COSINE_TOLERANCE outside [-1, 1]. Only int8 clips what
    lies within the tolerance: the other types store the value as it is.
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
    """What encode_affinity stored, as float32 of the same shape (a new array, except for float32)."""
    dtype = affinity_dtype(precision)
    if stored.dtype != dtype:
        raise ValueError(f"affinity of precision {precision} is stored as {dtype}, got {stored.dtype}")
    values = stored.astype(np.float32, copy=False)
    return values / np.float32(127) if precision == "int8" else values


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Upper 16 bits, rounded to nearest even. Values must not be NaN (the carry would make it infinite)."""
    bits = values.view(np.uint32)
    carry = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + carry) >> 16).astype(np.uint16)


def _dtype(known: dict[str, Any], precision: str, what: str, choices: tuple[str, ...]) -> np.dtype[Any]:
    if precision not in known:
        raise ValueError(f"{what} precision {precision!r}; expected one of {', '.join(choices)}")
    return np.dtype(known[precision])
