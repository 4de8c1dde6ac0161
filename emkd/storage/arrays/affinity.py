"""Affinity, [L, Nt] of the type that `precision` rounds to; along one axis, sample after sample.

    plain         each sample's [L, Nt], row by row            format version 1; lz4
    by vision     each sample's [Nt, L], row by row            zstd since format version 2, float16 and float32
    differences   [Nt, L], from vision token to vision token   zstd since format version 2, int8

Consecutive vision tokens are neighbours in the image, so their differences are small. Every RESTART-th token is stored
unchanged, so that decoding takes RESTART steps for any Nt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emkd.storage.arrays.kind import ArrayKind, Arrays, compression_of, rearranges
from emkd.storage.arrays.layout import ArrayLayout
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.precision import affinity_dtype

RESTART = 32


@dataclass(frozen=True)
class PlainAffinity(ArrayKind):
    """Each sample's [L, Nt], row by row."""

    layout: ArrayLayout

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.layout,)

    def encode(self, values: NDArray[Any]) -> Arrays:
        return {self.layout.name: values.reshape(-1)}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        return arrays[self.layout.name].reshape(shape)


@dataclass(frozen=True)
class AffinityByVision(ArrayKind):
    """Each sample's [Nt, L], row by row. differences: store differences from vision token to vision token"""

    layout: ArrayLayout
    differences: bool

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.layout,)

    def encode(self, values: NDArray[Any]) -> Arrays:
        by_vision = np.ascontiguousarray(values.T)
        return {self.layout.name: (along_tokens(by_vision) if self.differences else by_vision).reshape(-1)}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        by_vision = arrays[self.layout.name].reshape(shape[::-1])
        return (from_tokens(by_vision) if self.differences else by_vision).T


def affinity(manifest: Manifest) -> ArrayKind:
    """Return the kind that stores the affinity of a sample, [L, Nt], already rounded to the cache's precision."""
    precision, compression = manifest.affinity_precision, compression_of(manifest)
    by_vision, in_bytes = rearranges(manifest), precision == "int8"
    order = "[vision, text]" if by_vision else "[text, vision]"
    attributes = {
        "precision": precision,
        "kind": f"cosine similarity of hidden states; each sample's {order} matrix row by row",
    }
    if in_bytes and by_vision:
        attributes["stored_as"] = (
            f"round(127 * cosine), as differences from vision token to vision token but for every {RESTART}nd of a "
            "sample"
        )
    elif in_bytes:
        attributes["stored_as"] = "round(127 * cosine): divide by 127"
    layout = ArrayLayout(
        name="affinity",
        axis="affinity",
        dtype=affinity_dtype(precision),
        shuffle="noshuffle" if in_bytes and compression == "zstd" else "bitshuffle",
        compression=compression,
        attributes=attributes,
    )
    return AffinityByVision(layout, differences=in_bytes) if by_vision else PlainAffinity(layout)


def along_tokens(values: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return the differences (modulo 256) along the first axis of [Nt, L], unchanged at every RESTART-th token."""
    found = values.copy()
    found[1:] -= values[:-1]
    found[::RESTART] = values[::RESTART]
    return found


def from_tokens(differences: NDArray[np.int8]) -> NDArray[np.int8]:
    """Invert along_tokens: [Nt, L] from differences [Nt, L]."""
    found = differences.copy()
    whole = len(found) // RESTART * RESTART
    runs = found[:whole].reshape(whole // RESTART, RESTART, found.shape[1])
    rest = found[whole:]
    for step in range(1, RESTART):
        runs[:, step] += runs[:, step - 1]
    for step in range(1, len(rest)):
        rest[step] += rest[step - 1]
    return found
