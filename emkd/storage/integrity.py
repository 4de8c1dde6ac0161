"""Reading: no byte of a shard is used that was not checked.

A Zarr reader takes a missing chunk for zeros, and most codecs take a flipped bit for a number. The store
here stands between Zarr and the files: whatever is asked for, the whole object is read, compared in size
and SHA-256 with what the shard's index says of it, and only then sliced. The unit that is read is the unit
that is hashed.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from emkd.errors import DamagedCacheError
from emkd.storage.digest import NEXT_STEP, ObjectDigest, checked
from emkd.storage.files import LocalFiles

# Zarr asks for the metadata of older formats to find out what it has before it: it has none of these.
_PROBES = frozenset({".zgroup", ".zarray", ".zattrs", ".zmetadata"})


class VerifiedStore(Store):
    """A read-only Zarr store of the objects in one folder that `objects` vouches for.

    `get` raises DamagedCacheError, naming the object, for one that is missing, cut short, changed, or in no
    table: it never says None of a chunk.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, files: LocalFiles, prefix: str, objects: Mapping[str, ObjectDigest]) -> None:
        super().__init__(read_only=True)
        self._files = files
        self._prefix = prefix
        self._objects = objects

    def with_read_only(self, read_only: bool = False) -> "VerifiedStore":
        if not read_only:
            raise ValueError(f"{self}: a committed shard is never written again")
        return type(self)(self._files, self._prefix, self._objects)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifiedStore) and (
            (self._files, self._prefix, self._objects) == (other._files, other._prefix, other._objects)
        )

    def __str__(self) -> str:
        return f"verified://{self._files.where(self._prefix)}"

    def read(self, key: str) -> bytes:
        """A whole object, checked."""
        name = f"{self._prefix}/{key}"
        expected = self._objects.get(key)
        if expected is None:
            raise DamagedCacheError(
                f"{self._files.where(name)}: asked for, but in no table of objects: the shard's metadata "
                f"and its index do not belong together. {NEXT_STEP}"
            )
        return checked(self._files.where(name), self._files.read(name), expected)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if key not in self._objects and key.rpartition("/")[2] in _PROBES:
            return None
        data = await asyncio.to_thread(self.read, key)
        return prototype.buffer.from_bytes(_slice(data, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self._objects

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        for key in self._objects:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._objects:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        below = (key.removeprefix(start) for key in self._objects if key.startswith(start))
        for name in sorted({key.partition("/")[0] for key in below}):
            yield name


def _slice(data: bytes, byte_range: ByteRequest | None) -> Any:
    """The part of an object that was asked for, without a copy."""
    view = memoryview(data)
    match byte_range:
        case None:
            return data
        case RangeByteRequest(start, end):
            return view[start:end]
        case OffsetByteRequest(offset):
            return view[offset:]
        case SuffixByteRequest(suffix):
            return view[max(0, len(view) - suffix) :]
    raise TypeError(f"byte range {byte_range!r}; expected a range, an offset or a suffix")
