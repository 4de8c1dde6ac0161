"""Helpers for local disks: whole writes, syncs, and walks that raise if a folder cannot be listed."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP

PARTIAL = ".partial"
DELETED = ".deleted-"


def partial_of(path: Path) -> Path:
    """Return a path to write an object to before it gets its name. Partial files are never listed as objects."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and fsync it. Raises FileExistsError if it exists."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def walk(base: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, without partial files and folders that are being deleted."""
    for folder, folder_names, file_names in os.walk(base, onerror=refuse_unreadable):
        folder_names[:] = [name for name in folder_names if not name.startswith(DELETED)]
        yield folder, folder_names, [name for name in file_names if not name.endswith(PARTIAL)]


def refuse_unreadable(error: OSError) -> None:
    """Raise DamagedCacheError for a folder that cannot be listed: by default, os.walk treats it as empty.

    A folder that does not exist is not an error.
    """
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise unreadable(error.filename, error) from error


def unreadable(path: str | Path, error: OSError) -> DamagedCacheError:
    """Return the error for a file or folder that exists and cannot be read."""
    return DamagedCacheError(f"{path}: cannot be read ({error.strerror or error}). {NEXT_STEP}")


def sync(path: Path) -> None:
    """Call fsync on a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
