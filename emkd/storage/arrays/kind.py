"""The contract of a kind of array: how one field of a record is stored and read.

    values of one sample --encode--> {array name: stored numbers}, appended along the layouts' axis
    a sample's slice of those arrays --decode--> the same values

Each kind has its own module. It holds every form in which some format version stores the kind, and one function that
picks the form of a cache from its manifest. Encoding is exact: values are rounded to the cache's precision before (see
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
    """One field of a record in one form, such as the ids of vision tokens in two arrays."""

    @property
    @abstractmethod
    def layouts(self) -> tuple[ArrayLayout, ...]:
        """The arrays that store the values."""

    @abstractmethod
    def encode(self, values: NDArray[Any]) -> Arrays:
        """Return what is stored for one sample's values, by array name.

        The result may share memory with `values`, which are not changed.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the values of `shape` that were encoded, in their own memory: that of `arrays` is reused.

        Logits and affinities may be views: `precision` decodes them to new memory afterwards, and float32 is copied.
        """


def compression_of(manifest: Manifest) -> Compression:
    """Return the compression of all arrays: zstd in format version 1, which does not name it."""
    return manifest.compression or "zstd"


def rearranges(manifest: Manifest) -> bool:
    """Return whether logits and affinity are stored in an order that compresses well.

    They are not with lz4, which is meant for fast reads, and in format version 1.
    """
    return manifest.compression == "zstd"
