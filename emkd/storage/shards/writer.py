"""Writing: the rows of one shard become one Zarr group, whole, and its index.

Rows come one after the other, and chunks are encoded and written as they fill, so that a teacher can compute the next
ones meanwhile. Hashes in the index are of what was encoded, not of what a disk gave back. The folder belongs to this
attempt alone and means nothing until `index.commit_shard`. The same rows in the same order and the same manifest give
the same objects, bit for bit.

An image whose vision tokens were written before, of another sample of the shard, is not written again.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from emkd.errors import OutputExistsError
from emkd.storage.arrays.chunks import chunk_name, encode_chunk, group_metadata, metadata
from emkd.storage.arrays.kind import Arrays
from emkd.storage.arrays.layout import AXES, ArrayLayout, Axis
from emkd.storage.arrays.record_arrays import RecordArrays, group_attributes
from emkd.storage.index.commit import ShardIndex
from emkd.storage.index.rows import index_row, index_table
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import described_names
from emkd.storage.objects.digest import ObjectDigest
from emkd.storage.objects.files import Files, writing
from emkd.storage.objects.names import index_name, shard_prefix
from emkd.storage.record import CapturedRow, Record
from emkd.storage.shards.well_formed import check_plan, check_row


def write_shard(files: Files, number: int, attempt: str, rows: Sequence[CapturedRow], manifest: Manifest) -> ShardIndex:
    """Write one attempt at a shard, durably, and return its index for `commit_shard`.

    `rows` are the plan's rows of the shard, all of them, skipped ones included. Errors as those of ShardWriter.
    """
    check_plan([row.hint.row for row in rows], number, manifest)
    writer = ShardWriter(files, number, attempt, manifest)
    try:
        for row in rows:
            writer.add(row)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


class ShardWriter:
    """One attempt at a shard, row by row: `add` each row of the plan once, in any order, then `finish`.

    ValueError where rows are not those of the plan, or where a record has other shapes, ids or values than `record`
    documents (a mistake of the caller); OutputExistsError where the attempt has been written before; CacheWriteError
    where the disk is full or may not be written. After an error, `abandon`. Logits whose order ties after rounding are
    put in the order that a record promises: equal ones by ascending id.
    """

    def __init__(self, files: Files, number: int, attempt: str, manifest: Manifest) -> None:
        self.files, self.number, self.attempt, self.manifest = files, number, attempt, manifest
        self.prefix = shard_prefix(number, attempt)
        if files.names(self.prefix):
            raise OutputExistsError(
                f"{files.where(self.prefix)}: this attempt has been written already; give each attempt its own name"
            )
        self._record_arrays = RecordArrays.of(manifest)
        self._arrays = {layout.name: _ArrayWriter(layout) for layout in self._record_arrays.layouts}
        self._objects: dict[str, ObjectDigest] = {}
        self._rows: dict[int, dict[str, Any]] = {}
        self._halvings: dict[int, int] = {}
        self._lengths: dict[Axis, int] = dict.fromkeys(AXES, 0)
        self._images: dict[bytes, int] = {}

    def add(self, row: CapturedRow) -> None:
        """Take one row: encode it, and write the chunks that it fills."""
        check_row(row, self.number, self.manifest)
        if row.hint.row in self._rows:
            raise ValueError(f"shard {self.number}: row {row.hint.row} was added before")
        image_offsets = [] if row.record is None else self._add_vision(row.record)
        starts = {**self._lengths, "vision": image_offsets[0] if image_offsets else 0}
        if row.record is not None:
            self._append(self._record_arrays.encode_rest(row.record))
        self._rows[row.hint.row] = index_row(row, self.number, starts, image_offsets)
        if row.halvings:
            self._halvings[row.hint.row] = row.halvings

    def finish(self) -> ShardIndex:
        """Write what is left and make all of it durable."""
        check_plan(sorted(self._rows), self.number, self.manifest)
        for writer in self._arrays.values():
            for name, data in writer.finish():
                self._write(name, data)
        self._write("zarr.json", group_metadata(group_attributes(self.manifest, self.number)))
        with self._writing(0):
            self.files.sync_tree(self.prefix)
            self.files.sync_names(described_names(self.manifest))
        rows = [self._rows[row] for row in self.manifest.rows(self.number)]
        return ShardIndex(
            shard=self.number,
            attempt=self.attempt,
            settings_sha256=self.manifest.shard_sha256(self.number),
            objects=dict(sorted(self._objects.items())),
            table=index_table(rows, self.manifest.format_version),
            halvings=dict(sorted(self._halvings.items())),
        )

    def abandon(self) -> None:
        """Delete what was written: what is of no use must not fill a disk. Should that fail as well, it is the first
        error that says what to do, and nobody reads the folder."""
        with contextlib.suppress(OSError):
            self.files.delete_tree(self.prefix)

    def _add_vision(self, record: Record) -> list[int]:
        """Where each image's vision tokens begin; those that are new are appended."""
        arrays = self._record_arrays.encode_vision(record)
        offsets = []
        for span in record.images:
            part = {
                name: _tokens(self._arrays[name].layout, array, slice(span.start, span.start + span.count))
                for name, array in arrays.items()
            }
            digest = _digest(part) if self.manifest.format_version > 1 else None
            known = None if digest is None else self._images.get(digest)
            offsets.append(self._lengths["vision"] if known is None else known)
            if known is None:
                if digest is not None:
                    self._images[digest] = offsets[-1]
                self._append(part)
        return offsets

    def _append(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            writer = self._arrays[name]
            writer.append(array)
            self._lengths[writer.layout.axis] = writer.length
            for chunk, data in writer.full_chunks():
                self._write(chunk, data)

    def _write(self, name: str, data: bytes) -> None:
        digest = ObjectDigest.of if self.manifest.format_version == 1 else ObjectDigest.of_array
        self._objects[name] = digest(data)
        with self._writing(len(data)):
            self.files.write(f"{self.prefix}/{name}", data)

    @contextlib.contextmanager
    def _writing(self, n_bytes: int) -> Iterator[None]:
        """Around writing: nothing is lost where --clean took what had lost already (a folder is gone, or was between
        being found and being looked at)."""
        with writing(self.files, f"shard {self.number}", n_bytes):
            try:
                yield
            except (FileNotFoundError, FileExistsError):
                if not self.files.exists(index_name(self.number)):
                    raise


class _ArrayWriter:
    """One array: numbers come in, chunks come out."""

    def __init__(self, layout: ArrayLayout) -> None:
        self.layout = layout
        self.length = 0  # elements along the axis, so far
        self._pending: list[NDArray[Any]] = []
        self._n_pending = 0
        self._n_chunks = 0

    def append(self, array: NDArray[Any]) -> None:
        n = array.shape[self.layout.token_axis]
        self._pending.append(array)
        self._n_pending += n
        self.length += n

    def full_chunks(self) -> Iterator[tuple[str, bytes]]:
        """(name, object) of the chunks that are complete."""
        size = self.layout.tokens_per_chunk
        while self._n_pending >= size:
            joined = self._joined()
            self._pending = [_tokens(self.layout, joined, slice(size, None))]
            self._n_pending -= size
            yield self._chunk(_tokens(self.layout, joined, slice(size)))

    def finish(self) -> Iterator[tuple[str, bytes]]:
        """(name, object) of the rest and of what describes the array. The only chunk is as long as the array; the last
        one of several is filled up with zeros."""
        size = self.layout.tokens_per_chunk if self._n_chunks else self._n_pending
        if self._n_pending:
            last = np.zeros(self.layout.shape(size), self.layout.dtype)
            _tokens(self.layout, last, slice(self._n_pending))[...] = self._joined()
            yield self._chunk(last)
        yield f"{self.layout.name}/zarr.json", metadata(self.layout, self.length, size)

    def _joined(self) -> NDArray[Any]:
        return np.concatenate(self._pending, axis=self.layout.token_axis)

    def _chunk(self, values: NDArray[Any]) -> tuple[str, bytes]:
        name = f"{self.layout.name}/{chunk_name(self.layout, self._n_chunks)}"
        self._n_chunks += 1
        return name, encode_chunk(self.layout, values)


def _tokens(layout: ArrayLayout, array: NDArray[Any], chosen: slice) -> NDArray[Any]:
    """A view of some of an array's tokens."""
    return array[:, chosen] if layout.by_rank else array[chosen]


def _digest(arrays: Arrays) -> bytes:
    """Of all numbers of an image's vision tokens: those of equal digest are equal."""
    hashed = xxhash.xxh3_128()
    for name in sorted(arrays):
        hashed.update(f"{name} {arrays[name].shape}".encode())
        hashed.update(np.ascontiguousarray(arrays[name]).data)
    return hashed.digest()
