"""Write the rows of one shard as a Zarr group, and build its index.

Rows are added one by one, and chunks are encoded and written as they fill, so that a teacher can compute the next rows
meanwhile. The index has the hashes of the encoded bytes, not of bytes read back from a disk. The folder belongs to this
attempt alone, and readers ignore it until `index.commit.commit_shard`. The same rows in the same order and the same
manifest give the same objects, bit for bit.

If an earlier sample of the shard has an image with the same vision tokens, they are not written again.
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
from emkd.storage.index.commit import LogitError, ShardIndex
from emkd.storage.index.rows import index_row, index_table
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import manifest_files
from emkd.storage.objects.digest import ObjectDigest
from emkd.storage.objects.files import Files, writing
from emkd.storage.objects.names import index_name, shard_prefix
from emkd.storage.record import CapturedRow, Record
from emkd.storage.shards.well_formed import check_plan, check_row


def write_shard(files: Files, shard: int, attempt: str, rows: Sequence[CapturedRow], manifest: Manifest) -> ShardIndex:
    """Write one attempt at a shard, durably, and return its index for `commit_shard`.

    rows: all rows of the shard in the plan, in order, including skipped rows

    Raises as ShardWriter.
    """
    check_plan([row.hint.row for row in rows], shard, manifest)
    writer = ShardWriter(files, shard, attempt, manifest)
    try:
        for row in rows:
            writer.add(row)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


class ShardWriter:
    """One attempt at a shard, row by row: `add` each row of the plan once, in any order, then `finish`.

    Logits that rounding makes equal are sorted by ascending id, as in any record. Raises ValueError if the rows are not
    those of the plan or a record has other shapes, ids or values than `record` documents (a bug in the caller),
    OutputExistsError if the attempt was written before, and CacheWriteError if the disk is full or not writable. After
    an error, call `abandon`.
    """

    def __init__(self, files: Files, shard: int, attempt: str, manifest: Manifest) -> None:
        self.files, self.shard, self.attempt, self.manifest = files, shard, attempt, manifest
        self.prefix = shard_prefix(shard, attempt)
        if files.names(self.prefix):
            raise OutputExistsError(
                f"{files.where(self.prefix)}: this attempt was written before; give each attempt its own name"
            )
        self._record_arrays = RecordArrays.of(manifest)
        self._arrays = {layout.name: _ArrayWriter(layout) for layout in self._record_arrays.layouts}
        self._objects: dict[str, ObjectDigest] = {}
        self._rows: dict[int, dict[str, Any]] = {}
        self._halvings: dict[int, int] = {}
        self._squared_errors: dict[int, tuple[float, ...]] = {}
        self._lengths: dict[Axis, int] = {layout.axis: 0 for layout in self._record_arrays.layouts}
        self._images: dict[bytes, int] = {}

    def add(self, row: CapturedRow) -> None:
        """Encode one row, and write the chunks that it fills."""
        check_row(row, self.shard, self.manifest)
        if row.hint.row in self._rows:
            raise ValueError(f"shard {self.shard}: row {row.hint.row} was added before")
        image_offsets = [] if row.record is None else self._add_vision(row.record)
        starts = {axis: self._lengths.get(axis, 0) for axis in AXES}
        starts["vision"] = image_offsets[0] if image_offsets else 0
        if row.record is not None:
            self._append(self._record_arrays.encode_rest(row.record))
        self._rows[row.hint.row] = index_row(row, self.shard, starts, image_offsets)
        if row.halvings:
            self._halvings[row.hint.row] = row.halvings
        self._squared_errors[row.hint.row] = row.squared_error

    def finish(self) -> ShardIndex:
        """Write the remaining chunks and the metadata, make everything durable, and return the index."""
        check_plan(sorted(self._rows), self.shard, self.manifest)
        for writer in self._arrays.values():
            for name, data in writer.finish():
                self._write(name, data)
        self._write("zarr.json", group_metadata(group_attributes(self.manifest, self.shard)))
        with self._writing(0):
            self.files.sync_tree(self.prefix)
            self.files.sync_names(manifest_files(self.manifest))
        rows = [self._rows[row] for row in self.manifest.rows(self.shard)]
        return ShardIndex(
            shard=self.shard,
            attempt=self.attempt,
            settings_sha256=self.manifest.shard_sha256(self.shard),
            objects=dict(sorted(self._objects.items())),
            table=index_table(rows, self.manifest.format_version),
            halvings=dict(sorted(self._halvings.items())),
            logit_error=LogitError.of([error for row in sorted(self._rows) for error in self._squared_errors[row]]),
        )

    def abandon(self) -> None:
        """Delete what was written: unusable files must not fill a disk."""
        with contextlib.suppress(OSError):  # the first error says what to do, and no reader looks into the folder
            self.files.delete_tree(self.prefix)

    def _add_vision(self, record: Record) -> list[int]:
        """Append the vision tokens of new images. Returns the position in the shard of each image's first token."""
        offsets = []
        for span in record.images:
            tokens = record.vision.tokens(slice(span.start, span.start + span.count))
            part = self._record_arrays.encode_vision(tokens)
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
        """Turn an OSError into a CacheWriteError, and ignore files that are missing if another attempt has won.

        Then --clean may delete this attempt's folder while it is written, and nothing is lost.
        """
        with writing(self.files, f"shard {self.shard}", n_bytes):
            try:
                yield
            except (FileNotFoundError, FileExistsError):
                if not self.files.exists(index_name(self.shard)):
                    raise


class _ArrayWriter:
    """Collect the numbers of one array, and encode them chunk by chunk."""

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
        """Yield (name, bytes) of the chunks that are complete."""
        size = self.layout.tokens_per_chunk
        while self._n_pending >= size:
            joined = self._joined()
            self._pending = [_tokens(self.layout, joined, slice(size, None))]
            self._n_pending -= size
            yield self._chunk(_tokens(self.layout, joined, slice(size)))

    def finish(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, bytes) of the last chunk and of the array's metadata.

        A single chunk is as long as the array; the last of several chunks is padded with zeros.
        """
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
    """Return a view of the chosen tokens."""
    return array[:, chosen] if layout.by_rank else array[chosen]


def _digest(arrays: Arrays) -> bytes:
    """Return a hash of all numbers of an image's vision tokens: images with the same hash are stored once."""
    hashed = xxhash.xxh3_128()
    for name in sorted(arrays):
        hashed.update(f"{name} {arrays[name].shape}".encode())
        hashed.update(np.ascontiguousarray(arrays[name]).data)
    return hashed.digest()
