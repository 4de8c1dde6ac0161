"""Stored logits, [n, k] of the type that `precision` rounds them to, descending within each token.

    plain     [n, k] as they are           format version 1; lz4
    ranked    [k, n] keys, rank by rank    zstd, from format version 2 on

Keys are unsigned integers in the order of the logits. They descend within a token, so that the differences from rank to
rank are small, and rank by rank they compress well: the first rank as it is, then how much each falls below the one
before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emkd.storage.arrays.kind import ArrayKind, Arrays, compression_of, rearranges
from emkd.storage.arrays.layout import ArrayLayout, plain_shuffle
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.precision import STEPS, LogitsPrecision, logits_dtype

_UNSIGNED: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


@dataclass(frozen=True)
class PlainLogits(ArrayKind):
    layout: ArrayLayout

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.layout,)

    def encode(self, values: NDArray[Any]) -> Arrays:
        return {self.layout.name: values}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        return arrays[self.layout.name].reshape(shape)


@dataclass(frozen=True)
class RankedLogits(ArrayKind):
    """stored: the type of the values, whose keys are as wide."""

    layout: ArrayLayout
    stored: np.dtype[Any]

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.layout,)

    def encode(self, values: NDArray[Any]) -> Arrays:
        return {self.layout.name: by_rank(to_keys(values))}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        return from_keys(from_ranks(arrays[self.layout.name]), self.stored).T


def logits(axis: Literal["vision", "answer"], k: int, manifest: Manifest) -> ArrayKind:
    """The k stored logits of each vision or answer token, rounded to the cache's precision already."""
    precision, compression = manifest.logits_precision, compression_of(manifest)
    stored = logits_dtype(precision)
    if not rearranges(manifest):
        return PlainLogits(
            ArrayLayout(
                name=f"{axis}_logits",
                axis=axis,
                dtype=stored,
                width=k,
                shuffle=plain_shuffle(compression),
                compression=compression,
                attributes=_attributes(precision) | _plain_attributes(precision),
            )
        )
    layout = ArrayLayout(
        name=f"{axis}_logits",
        axis=axis,
        dtype=key_dtype(stored),
        width=k,
        by_rank=True,
        compression=compression,
        attributes=_attributes(precision)
        | {
            "stored_as": f"keys: {_number(precision)}, as unsigned integers of the same order; the first rank, then "
            "how much each rank falls below the one before it"
        },
    )
    return RankedLogits(layout, stored)


def _attributes(precision: LogitsPrecision) -> dict[str, Any]:
    return {"precision": precision, "kind": "raw logits, descending; equal ones by ascending id", "temperature": 1}


def _plain_attributes(precision: LogitsPrecision) -> dict[str, Any]:
    return {} if precision in ("float16", "float32") else {"stored_as": _number(precision)}


def _number(precision: LogitsPrecision) -> str:
    """What stands for a logit."""
    if precision in STEPS:
        return f"multiples of {STEPS[precision]:g}"
    return "the upper 16 bits of the float32" if precision == "bfloat16" else "the number"


def key_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Type of the keys of numbers that are stored as this type."""
    return _UNSIGNED[stored.itemsize]


def to_keys(stored: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers of the same width, ordered as the numbers that were stored (bfloat16 as its bits, any IEEE
    type, int16)."""
    bits = stored.view(key_dtype(stored.dtype))
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    if stored.dtype.kind == "i":
        return bits ^ sign
    # Positive numbers go above all negative ones, and those descend with their bits.
    return bits ^ (_sign_spread(bits) | sign)


def from_keys(keys: NDArray[Any], stored: np.dtype[Any]) -> NDArray[Any]:
    """The inverse of to_keys."""
    sign = keys.dtype.type(1 << (8 * keys.itemsize - 1))
    mask = sign if stored.kind == "i" else ~_sign_spread(keys) | sign
    found: NDArray[Any] = (keys ^ mask).view(stored)
    return found


def _sign_spread(bits: NDArray[Any]) -> NDArray[Any]:
    """All bits of a number are its uppermost one."""
    signed = bits.view(f"i{bits.itemsize}")
    return (signed >> (8 * bits.itemsize - 1)).view(bits.dtype)


def by_rank(keys: NDArray[Any]) -> NDArray[Any]:
    """[k, n] from keys [n, k]: the first rank, then how much each falls below the one before it (modulo the type)."""
    # Not ascontiguousarray, which is the very memory of `keys` where there is one token or one rank.
    ranks = np.array(keys.T, order="C")
    ranks[1:] = ranks[:-1] - ranks[1:]
    return ranks


def from_ranks(ranks: NDArray[Any]) -> NDArray[Any]:
    """Keys [k, n] from the output of by_rank, rank by rank still."""
    keys = np.empty_like(ranks)
    keys[:1] = ranks[:1]
    for rank in range(1, len(ranks)):
        np.subtract(keys[rank - 1], ranks[rank], out=keys[rank])
    return keys
