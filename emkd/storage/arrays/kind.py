"""A kind of array: what a shard stores of one kind of number, and how it comes back.

    values of one sample --encode--> {array name: stored numbers}, appended along the layouts' axis
    a sample's slice of those arrays --decode--> the same values

Each kind has a file of its own, with every form that a format version stored it in side by side, and one function that
picks the form of a cache from its manifest. Encoding is exact: rounding to the cache's precision happens before it (see
`precision`). docs/architecture.md says how to add a kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from emkd.storage.arrays.layout import ArrayLayout
from emkd.storage.manifest.manifest import Compression, Manifest

Arrays = dict[str, NDArray[Any]]


class ArrayKind(ABC):
    """The numbers of one kind, such as the ids of vision tokens."""

    @property
    @abstractmethod
    def layouts(self) -> tuple[ArrayLayout, ...]:
        """The arrays that the numbers are stored in."""

    @abstractmethod
    def encode(self, values: NDArray[Any]) -> Arrays:
        """What is stored of one sample's values, by array name. May share memory with `values`, which it leaves as they
        are."""

    @abstractmethod
    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        """The values of `shape` that were encoded. May share memory with `arrays`."""


def compression_of(manifest: Manifest) -> Compression:
    """Of all arrays. Format version 1 names none."""
    return manifest.compression or "zstd"


def rearranges(manifest: Manifest) -> bool:
    """Whether logits and affinity are stored in an order that compresses well. With lz4, which is there to be read
    fast, and in format version 1 they are stored as they are."""
    return manifest.compression == "zstd"
