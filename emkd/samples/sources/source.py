"""What every format of data files gives: rows by number, and their texts in order."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emkd.errors import SampleError

RawRow = dict[str, Any]

SEE = (
    "Expected one row for each sample: messages, a list of {role, content}, or conversations, a list of {from, value}; "
    "and images, if it has any"
)


class Source(ABC):
    """One file of a dataset.

    name:   without folders, so that a dataset may be moved
    n_rows: rows have the numbers 0 to n_rows - 1
    """

    path: Path
    n_rows: int

    @property
    def name(self) -> str:
        return self.path.name

    def digest(self) -> str:
        """A hash of the file."""
        return sampled_sha256(self.path)

    def names_paths(self) -> bool:
        """Whether images can only be read with an image root, as far as that is known without reading rows."""
        return False

    @abstractmethod
    def row(self, index: int) -> RawRow:
        """One row with every column that is read or must not be dropped. Raises SampleError if it cannot be read."""

    @abstractmethod
    def texts(self) -> Iterator[RawRow | SampleError]:
        """Yield the conversation of each row, in order, without reading images."""

    @abstractmethod
    def unread(self) -> set[str]:
        """Names that rows have and that emkd neither reads nor refuses, as far as they are known without parsing."""


def sampled_sha256(path: Path, block: int = 1 << 16, n_blocks: int = 256) -> str:
    """SHA-256 of a file of up to 16 MB; of a larger file, of 256 blocks spread over it from the first to the last.

    Detects a different file quickly, at any size; the content of a row is guaranteed by its key.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= block * n_blocks:
            return hashlib.sha256(file.read()).hexdigest()
        for number in range(n_blocks):
            file.seek((size - block) * number // (n_blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()
