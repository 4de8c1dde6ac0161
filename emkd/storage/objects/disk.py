"""What local disks are asked for underneath `files`: whole writes, syncs, walks that hide nothing."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP

PARTIAL = ".partial"
DELETED = ".deleted-"


def partial_of(path: Path) -> Path:
    """Where an object is written before it gets its name: never listed as an object."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def walk(base: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk without what is being written or deleted."""
    for folder, folder_names, file_names in os.walk(base, onerror=refuse_unreadable):
        folder_names[:] = [name for name in folder_names if not name.startswith(DELETED)]
        yield folder, folder_names, [name for name in file_names if not name.endswith(PARTIAL)]


def refuse_unreadable(error: OSError) -> None:
    """os.walk takes a folder that it cannot list for an empty one; only one that does not exist is."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise unreadable(error.filename, error) from error


def unreadable(path: str | Path, error: OSError) -> DamagedCacheError:
    return DamagedCacheError(f"{path}: cannot be read ({error.strerror or error}). {NEXT_STEP}")


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
