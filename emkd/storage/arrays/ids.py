"""The ids of stored logits, [n, k] int32, by descending logit.

    whole    one int32 array                          format version 1; version 2 with lz4
    split    the lower 16 bits, and the bits above    format version 2 with zstd; version 3

The lower bits hardly compress, and the upper bits compress to almost nothing, so each gets its own array and shuffle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emkd.storage.arrays.kind import ArrayKind, Arrays, compression_of, rearranges
from emkd.storage.arrays.layout import ArrayLayout, plain_shuffle
from emkd.storage.manifest.manifest import Manifest

LOW_BITS = 16


@dataclass(frozen=True)
class WholeIds(ArrayKind):
    """One int32 array [n, k]."""

    layout: ArrayLayout

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.layout,)

    def encode(self, values: NDArray[Any]) -> Arrays:
        return {self.layout.name: values}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        return arrays[self.layout.name].reshape(shape).copy()


@dataclass(frozen=True)
class SplitIds(ArrayKind):
    """Two arrays [n, k]. high: None if no id needs more than the lower bits"""

    low: ArrayLayout
    high: ArrayLayout | None

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.low,) if self.high is None else (self.low, self.high)

    def encode(self, values: NDArray[Any]) -> Arrays:
        low, high = split_ids(values)
        return {self.low.name: low} if self.high is None else {self.low.name: low, self.high.name: high}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        return join_ids(arrays[self.low.name], None if self.high is None else arrays[self.high.name]).reshape(shape)


def ids(axis: Literal["vision", "answer"], k: int, manifest: Manifest) -> ArrayKind:
    """Return the kind that stores the ids of the k stored logits of each vision or answer token."""
    compression = compression_of(manifest)
    if not rearranges(manifest) and manifest.format_version < 3:
        return WholeIds(
            ArrayLayout(
                name=f"{axis}_ids",
                axis=axis,
                dtype=np.dtype(np.int32),
                width=k,
                shuffle=plain_shuffle(compression),
                compression=compression,
            )
        )
    low = ArrayLayout(
        name=f"{axis}_ids_low",
        axis=axis,
        dtype=np.dtype(np.uint16),
        width=k,
        shuffle="shuffle",  # the lower byte does not compress at all; shuffled by bytes, it is only copied
        compression=compression,
        attributes={"meaning": "lower 16 bits of the ids, by descending logit; equal ones by ascending id"},
    )
    high = ArrayLayout(
        name=f"{axis}_ids_high",
        axis=axis,
        dtype=np.dtype(np.uint8),
        width=k,
        compression=compression,
        attributes={"meaning": f"id >> {LOW_BITS}"},
    )
    return SplitIds(low, high if manifest.vocabulary_size > 1 << LOW_BITS else None)


def split_ids(values: NDArray[np.int32]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Return (low, high) of ids below 2**24, of any shape: id = low + 65,536 high."""
    return (values & 0xFFFF).astype(np.uint16), (values >> LOW_BITS).astype(np.uint8)


def join_ids(low: NDArray[np.uint16], high: NDArray[np.uint8] | None) -> NDArray[np.int32]:
    """Invert split_ids, for any shape. high: None if no id has bits above the lower 16"""
    if high is None:
        return low.astype(np.int32)
    values = high.astype(np.int32)
    values <<= LOW_BITS
    values |= low
    return values
