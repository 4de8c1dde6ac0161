"""The tail of the logits: one float32 number per token, in every format version."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emkd.storage.arrays.kind import ArrayKind, Arrays, compression_of
from emkd.storage.arrays.layout import ArrayLayout
from emkd.storage.manifest.manifest import Manifest

_MEANINGS = {
    "tail_logsumexp": "natural logarithm of the sum of exp of the V - k logits that are not stored",
    "tail_mean": "mean of the V - k logits that are not stored; 0 where there are none",
}


@dataclass(frozen=True)
class Tail(ArrayKind):
    """One float32 array [n]."""

    layout: ArrayLayout

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.layout,)

    def encode(self, values: NDArray[Any]) -> Arrays:
        return {self.layout.name: values}

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        return arrays[self.layout.name].reshape(shape).copy()


def tail(
    name: Literal["tail_logsumexp", "tail_mean"], axis: Literal["vision", "answer"], manifest: Manifest
) -> ArrayKind:
    """Return the kind that stores one number about the tail of each vision or answer token."""
    return Tail(
        ArrayLayout(
            name=f"{axis}_{name}",
            axis=axis,
            dtype=np.dtype(np.float32),
            compression=compression_of(manifest),
            attributes={"meaning": _MEANINGS[name]},
        )
    )
