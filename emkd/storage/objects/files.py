"""The contract of a store of objects.

Names are relative, with "/" between their parts: "index/000000.parquet". An object store has the same operations: read
a whole object, list a prefix, write, and create only if absent (a conditional put).

Only `create` makes an object visible to other processes, and the object is durable when it returns. `write` is for a
folder that nobody reads yet; `sync_tree` makes it durable. `FilesTests` in `tests/storage/objects/files.py` tests this
contract; subclass it for a new store.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from emkd.errors import CacheWriteError, EmkdError


class Files(ABC):
    """The objects of one cache. `root` is the name of the store in messages."""

    root: Path

    def where(self, name: str) -> str:
        """Return the full name of an object, for messages."""
        return f"{self.root}/{name}"

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the free space for new objects, in bytes."""

    @abstractmethod
    def check_writable(self) -> None:
        """Check that objects can be written. Raises CacheWriteError if not."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Read a whole object. Returns None if it does not exist: only the caller knows whether that is an error.

        Raises DamagedCacheError if the store fails or its permissions forbid reading.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether an object (not a folder) of this name exists."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return {name: size in bytes} of every object in the folder `prefix` and below, sorted by name."""

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of every object in the folder `prefix` and below, sorted.

        The list is empty if the folder does not exist.
        """
        return list(self.sizes(prefix))

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly in `prefix`, sorted, including folders that are being deleted."""

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
        """Delete the partial files that killed writers left of objects that exist. Returns the names of these files."""

    @abstractmethod
    def sync_tree(self, prefix: str) -> None:
        """Make everything in the folder `prefix` durable, and the folder's own name."""

    @abstractmethod
    def sync_names(self, names: Iterable[str]) -> None:
        """Make the names of objects and of their folders durable: the process that created them may have been killed
        before it did so. Raises CacheWriteError."""


@contextlib.contextmanager
def writing(files: Files, what: str, n_bytes: int) -> Iterator[None]:
    """Turn an OSError while `what` is written, `n_bytes` in total, into a CacheWriteError.

    The message says how many bytes are needed and how many are free.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, EmkdError):  # has its own message
            raise
        space = f": it needs {n_bytes:,} bytes and {files.free_bytes():,} are free" if n_bytes else ""
        raise CacheWriteError(
            f"{files.root}: {what} cannot be written ({error.strerror or error}){space}. What was committed stays; "
            "free some space or fix the permissions, and run the same command again"
        ) from error
