"""Stored logits, [n, k] of the type that `precision` rounds to, descending within each token.

    plain     [n, k] unchanged             format version 1; lz4
    ranked    [k, n] keys, rank by rank    zstd, since format version 2

Keys are unsigned integers in the order of the logits. They descend within a token, so the differences from rank to rank
are small and compress well: the first rank is stored unchanged, each further rank as its distance below the rank before
it.
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
    """One array [n, k], unchanged."""

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
    """One array of keys [k, n]. stored: the type of the values; keys have the same width"""

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
    """Return the kind that stores the k logits of each vision or answer token, already rounded to the cache's
    precision."""
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
    """Return what stands for a logit on disk, for the attribute `stored_as`."""
    if precision in STEPS:
        return f"multiples of {STEPS[precision]:g}"
    return "the upper 16 bits of the float32" if precision == "bfloat16" else "the number"


def key_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of the keys of numbers of type `stored`."""
    return _UNSIGNED[stored.itemsize]


def to_keys(stored: NDArray[Any]) -> NDArray[Any]:
    """Return unsigned integers of the same width and in the same order as `stored`, which are bfloat16 bits, any IEEE
    type or int16."""
    bits = stored.view(key_dtype(stored.dtype))
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    if stored.dtype.kind == "i":
        return bits ^ sign
    # Positive numbers go above all negative numbers, which descend as their bits ascend.
    return bits ^ (_sign_spread(bits) | sign)


def from_keys(keys: NDArray[Any], stored: np.dtype[Any]) -> NDArray[Any]:
    """Invert to_keys, for any shape; `stored` is the type of the numbers."""
    sign = keys.dtype.type(1 << (8 * keys.itemsize - 1))
    mask = sign if stored.kind == "i" else ~_sign_spread(keys) | sign
    found: NDArray[Any] = (keys ^ mask).view(stored)
    return found


def _sign_spread(bits: NDArray[Any]) -> NDArray[Any]:
    """Return numbers all of whose bits are the uppermost bit of `bits`."""
    signed = bits.view(f"i{bits.itemsize}")
    return (signed >> (8 * bits.itemsize - 1)).view(bits.dtype)


def by_rank(keys: NDArray[Any]) -> NDArray[Any]:
    """Return [k, n] from keys [n, k]: the first rank, then the distance of each rank below the rank before it (modulo
    the type)."""
    # Not ascontiguousarray, which returns the memory of `keys` itself if there is one token or one rank.
    ranks = np.array(keys.T, order="C")
    ranks[1:] = ranks[:-1] - ranks[1:]
    return ranks


def from_ranks(ranks: NDArray[Any]) -> NDArray[Any]:
    """Return keys [k, n] from the output of by_rank; they stay rank by rank."""
    keys = np.empty_like(ranks)
    keys[:1] = ranks[:1]
    for above, distance, own in zip(keys[:-1], ranks[1:], keys[1:], strict=True):
        np.subtract(above, distance, out=own)
    return keys
