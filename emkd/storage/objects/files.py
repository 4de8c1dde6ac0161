"""What a store of objects does: the contract that every store keeps, whatever lies underneath.

Names are relative, with "/" between their parts: "index/000000.parquet". The operations are those that an object store
has, too: read a whole object, list a prefix, write, and create only if absent (there a conditional put).

`create` is the only operation that makes something visible to others, and it is durable when it returns; `write` is for
a folder that nobody reads yet, made durable by `sync_tree`. `tests/storage/objects/files.py` tests this contract; a new
store subclasses it there.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from emkd.errors import CacheWriteError, EmkdError


class Files(ABC):
    """The objects of one cache. `root` is what messages call the store."""

    root: Path

    def where(self, name: str) -> str:
        """The full name of an object, for messages."""
        return f"{self.root}/{name}"

    @abstractmethod
    def free_bytes(self) -> int:
        """Free space for new objects, in bytes."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises CacheWriteError if nothing can be written."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A whole object; None if there is none, since the caller knows what that means.

        Raises DamagedCacheError if the store or its permissions do not let it be read.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is an object (not a folder) of this name."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name -> size in bytes of every object in the folder `prefix` and below, sorted by name."""

    def names(self, prefix: str = "") -> list[str]:
        """Names of every object in the folder `prefix` and below, sorted; empty if the folder does not exist."""
        return list(self.sizes(prefix))

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly in `prefix`, sorted, including folders that are being deleted."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a new object into a folder that only this caller uses. Not durable before `sync_tree`."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Create an object, whole and durable, only if absent: False if it exists already.

        Exactly one of several concurrent callers gets True. Raises CacheWriteError if it cannot be written.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Replace a damaged object, whole and durably, in one step. Raises CacheWriteError."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object, durably; does nothing if there is none. Raises CacheWriteError."""

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Delete the folder `prefix` and everything in it; does nothing if there is none.

        A reader sees all of it or nothing, and a writer that is still busy there does not stop the deletion.
        """

    @abstractmethod
    def delete_partials(self) -> list[str]:
        """Delete what killed writers left of objects that exist; returns the names of what was deleted."""

    @abstractmethod
    def sync_tree(self, prefix: str) -> None:
        """Make everything in the folder `prefix` durable, and its own name."""

    @abstractmethod
    def sync_names(self, names: Iterable[str]) -> None:
        """Make the names of objects and of their folders durable: whoever created them may have been killed before
        doing so. Raises CacheWriteError."""


@contextlib.contextmanager
def writing(files: Files, what: str, n_bytes: int) -> Iterator[None]:
    """Turn an OSError while `what` is written, `n_bytes` in total, into a CacheWriteError that says how many bytes are
    needed and how many are free."""
    try:
        yield
    except OSError as error:
        if isinstance(error, EmkdError):  # says what it has to say already
            raise
        space = f": it needs {n_bytes:,} bytes and {files.free_bytes():,} are free" if n_bytes else ""
        raise CacheWriteError(
            f"{files.root}: {what} cannot be written ({error.strerror or error}){space}. What was committed stays; "
            "free some space or fix the permissions, and run the same command again"
        ) from error
