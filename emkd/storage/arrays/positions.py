"""Ids of text tokens and positions of answer tokens: one int32 number per token, in every format version."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emkd.storage.arrays.kind import ArrayKind, Arrays, compression_of
from emkd.storage.arrays.layout import ArrayLayout
from emkd.storage.manifest.manifest import Manifest


@dataclass(frozen=True)
class Positions(ArrayKind):
    """One int32 array [n]."""

    layout: ArrayLayout

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.layout,)

    def encode(self, values: NDArray[Any]) -> Arrays:
        return {self.layout.name: values}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        return arrays[self.layout.name].reshape(shape).copy()


def text_ids(manifest: Manifest) -> ArrayKind:
    """Return the kind that stores the ids of a sample's text tokens, [L]."""
    dtype = np.dtype(np.int32)
    return Positions(ArrayLayout(name="text_ids", axis="text", dtype=dtype, compression=compression_of(manifest)))


def answer_positions(manifest: Manifest) -> ArrayKind:
    """Return the kind that stores the positions of a sample's answer tokens among its text tokens, [A]."""
    return Positions(
        ArrayLayout(
            name="answer_positions",
            axis="answer",
            dtype=np.dtype(np.int32),
            compression=compression_of(manifest),
            attributes={"meaning": "index of the answer token among its sample's text tokens"},
        )
    )
