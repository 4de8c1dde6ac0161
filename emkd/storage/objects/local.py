"""The store in a local folder.

Files and folders that remain after a crash never have the name of an object: a file that is being written starts with
"." and ends with ".partial", a folder that is being deleted starts with ".deleted-". Neither is ever listed.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from emkd.errors import CacheWriteError, UsageError
from emkd.storage.objects.disk import (
    DELETED,
    PARTIAL,
    partial_of,
    refuse_unreadable,
    sync,
    unreadable,
    walk,
    write_durably,
)
from emkd.storage.objects.files import Files, writing


@dataclass(frozen=True)
class LocalFiles(Files):
    """Objects in a local folder, which need not exist yet. `create` needs a file system with hard links."""

    root: Path

    def free_bytes(self) -> int:
        """Return the free space in bytes of the disk that holds the cache or will hold it."""
        return shutil.disk_usage(self._existing()).free

    def check_writable(self) -> None:
        """Check that the root is, or can become, a writable folder. Raises CacheWriteError if not."""
        folder = self._existing()
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "is not writable" if folder.is_dir() else "is not a folder"
            raise CacheWriteError(f"{self.root}: {folder} {what}; name another folder or fix its permissions")

    def _existing(self) -> Path:
        """Return the root, or the nearest folder above it that exists."""
        root = self.root.absolute()
        # os.path.exists returns False for a path that the permissions hide.
        return next(path for path in (root, *root.parents) if os.path.exists(path))

    def read(self, name: str) -> bytes | None:
        """Read a whole object. Returns None if it does not exist.

        Raises DamagedCacheError if the disk fails or the permissions forbid reading.
        """
        path = self._path(name)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise unreadable(path, error) from error

    def exists(self, name: str) -> bool:
        """Return whether an object (not a folder) of this name exists."""
        return os.path.isfile(self._path(name))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return {name: size in bytes} of every object in the folder `prefix` and below, sorted by name."""
        base = self._path(prefix)
        found: dict[str, int] = {}
        for folder, _, file_names in walk(base):
            for file_name in file_names:
                path = Path(folder, file_name)
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly in `prefix`, sorted, including folders that are being deleted."""
        base = self._path(prefix)
        if not base.is_dir():
            return []
        return sorted(f"{prefix}/{entry.name}" for entry in os.scandir(base) if entry.is_dir())

    def write(self, name: str, data: bytes) -> None:
        """Write a new object into a folder that only this caller uses. Not durable before `sync_tree`."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object, whole and durable, only if absent: False if it exists already.

        Exactly one of several concurrent callers gets True. Raises CacheWriteError if the object cannot be written,
        and UsageError on a file system without hard links.
        """
        with writing(self, name, len(data)):
            return self._create(name, data)

    def _create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        if path.exists():  # the usual case, found without writing
            return False
        self._make_folder(path.parent)
        self._sync_names([name])
        partial = partial_of(path)
        try:
            write_durably(partial, data)
            os.link(partial, path)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if not path.exists():
                raise
            return False  # --clean deleted the partial file, which it does only if the object exists
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK) and partial.exists():
                raise UsageError(
                    f"cannot create {path}: the file system of {path.parent} has no hard links ({error.strerror}), "
                    "which keep two runs from overwriting each other; put the cache on another file system"
                ) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Replace a damaged object, whole and durably, in one step. Raises CacheWriteError."""
        path = self._path(name)
        partial = partial_of(path)
        with writing(self, name, len(data)):
            try:
                write_durably(partial, data)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            sync(path.parent)

    def delete(self, name: str) -> None:
        """Delete an object, durably; does nothing if there is none. Raises CacheWriteError."""
        path = self._path(name)
        with writing(self, f"the removal of {name}", 0), contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync(path.parent)

    def sync_tree(self, prefix: str) -> None:
        """Make everything in the folder `prefix` durable: each file, each folder, and the folder's own name."""
        base = self._path(prefix)
        for folder, _, file_names in os.walk(base, topdown=False, onerror=refuse_unreadable):
            for file_name in file_names:
                sync(Path(folder, file_name))
            sync(Path(folder))
        for parent in base.parents:
            if parent == self.root.parent or not parent.exists():
                break
            sync(parent)

    def sync_names(self, names: Iterable[str]) -> None:
        """Make the names of objects and of their folders durable: the process that created them may have been killed
        before it did so. Raises CacheWriteError."""
        with writing(self, "the names of folders", 0):
            self._sync_names(names)

    def _sync_names(self, names: Iterable[str]) -> None:
        folders = {folder for name in names for folder in self._path(name).parents}
        for folder in sorted(folders - set(self.root.parents)):
            sync(folder)
        with contextlib.suppress(PermissionError):  # the root's own name: its parent may belong to another user
            sync(self.root.parent)

    def delete_partials(self) -> list[str]:
        """Delete the partial files that killed writers left of objects that exist. Returns the names of these files."""
        deleted = []
        for path in sorted(self.root.rglob(f".*{PARTIAL}")):
            target = path.with_name(path.name[1:].rsplit(".", 2)[0])
            if target.exists():
                path.unlink(missing_ok=True)
                deleted.append(path.relative_to(self.root).as_posix())
        return deleted

    def delete_tree(self, prefix: str) -> None:
        """Delete the folder `prefix` and everything in it; does nothing if there is none.

        The folder loses its name first, in one step: a reader sees all of it or nothing, and a writer that is still
        busy there does not stop the deletion.
        """
        path = self._path(prefix)
        if path == self.root:
            raise ValueError("delete_tree: refusing to delete the whole cache; name a folder in it")
        doomed = path if path.name.startswith(DELETED) else path.with_name(DELETED + uuid.uuid4().hex)
        with contextlib.suppress(FileNotFoundError):
            path.rename(doomed)
        while doomed.exists():
            with contextlib.suppress(FileNotFoundError):  # another process deletes it, too
                shutil.rmtree(doomed)

    def _path(self, name: str) -> Path:
        if name.startswith("/") or ".." in name.split("/"):  # names are read from files, which may be forged
            raise ValueError(f"{name!r} is not the name of an object of {self.root}: it leads outside")
        return self.root / name

    def _make_folder(self, folder: Path) -> None:
        """As mkdir -p, and make the names of the new folders durable."""
        missing = [folder, *folder.parents]
        missing = missing[: next(i for i, path in enumerate(missing) if path.is_dir())]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync(path.parent)
