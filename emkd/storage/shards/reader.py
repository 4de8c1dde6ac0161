"""A shard in memory, and records cut from it.

The chunks of all arrays are decompressed once and kept as they are stored, which takes half of what records take; a
record is put together when it is asked for, and its numbers are its own. Shape legend in `record` and `layout`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from emkd.errors import SampleNotFoundError
from emkd.storage.arrays.chunks import StoredArray
from emkd.storage.arrays.kind import Arrays
from emkd.storage.arrays.layout import AXES, ArrayLayout, Axis
from emkd.storage.arrays.record_arrays import RecordArrays
from emkd.storage.index.commit import ShardIndex
from emkd.storage.index.table import OK, images_from_json, n_stored_vision, with_all_columns
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.checked import CheckedObjects
from emkd.storage.objects.files import Files
from emkd.storage.record import Record
from emkd.storage.shards.buffers import Buffers

# Of the index: what a record is cut by.
_COLUMNS = ("key", "images", *(f"{axis}_{what}" for axis in AXES for what in ("offset", "count")))


@dataclass(frozen=True, kw_only=True)
class ChunkedArray:
    """An array as its decompressed chunks, one behind the other.

    chunks: [chunks, tokens of a chunk, ...], or [chunks, k, tokens of a chunk] where the layout is by rank; the last
            one may be longer than the array
    """

    layout: ArrayLayout
    chunks: NDArray[Any]

    def take(self, runs: Sequence[tuple[int, int]]) -> NDArray[Any]:
        """Tokens [first, last) of the array, run after run: a view where they are in one piece."""
        parts = [part for run in runs for part in self._ranks(*run)] if self.layout.by_rank else self._pieces(runs)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts or [np.empty(self.layout.shape(0), self.layout.dtype)], axis=self.layout.token_axis)

    def _pieces(self, runs: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
        return [self._in_one_piece[first:last] for first, last in runs]

    @cached_property
    def _in_one_piece(self) -> NDArray[Any]:
        """[tokens, ...], where the layout is not by rank"""
        return self.chunks.reshape(-1, *self.chunks.shape[2:])

    def _ranks(self, first: int, last: int) -> Iterable[NDArray[Any]]:
        size = self.chunks.shape[2]
        for i in range(first // size, -(-last // size)):
            yield self.chunks[i][:, max(first - i * size, 0) : min(last - i * size, size)]


@dataclass(frozen=True, kw_only=True)
class DecodedShard:
    """The arrays of a shard, by name, and _COLUMNS of its samples (skipped rows are left out)."""

    number: int
    record_arrays: RecordArrays
    arrays: dict[str, ChunkedArray]
    samples: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        """Samples in the shard."""
        return len(self.samples)

    @property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        return sum(array.chunks.nbytes for array in self.arrays.values())

    def release(self, buffers: Buffers) -> None:
        """Gives the memory of the arrays to those that come next; the shard is of no use any more."""
        for array in self.arrays.values():
            buffers.give_back(array.chunks)

    def record(self, i: int) -> Record:
        """The i-th sample of the shard, 0-based. SampleNotFoundError where it has fewer."""
        if not 0 <= i < len(self):
            raise SampleNotFoundError(f"sample {i} of shard {self.number}: it has {len(self)} samples")
        row = self.samples[i]
        fields = self.record_arrays.decode(self.stored(i))
        return Record(key=row["key"], images=images_from_json(row["images"]), **fields)

    def stored(self, i: int) -> Arrays:
        """What is stored of the i-th sample, by array name: views, where it is in one piece."""
        row = self.samples[i]
        runs: dict[Axis, list[tuple[int, int]]] = {
            axis: [(row[f"{axis}_offset"], row[f"{axis}_offset"] + row[f"{axis}_count"])] for axis in AXES
        }
        runs["vision"] = _runs(row["images"])
        return {name: array.take(runs[array.layout.axis]) for name, array in self.arrays.items()}


def read_shard(files: Files, index: ShardIndex, manifest: Manifest, buffers: Buffers | None = None) -> DecodedShard:
    """Read all arrays of a committed shard, checked, into memory of their own or into buffers that are used again.

    DamagedCacheError where an object is missing or changed, or where the arrays are not the ones that the
    manifest and the index describe.
    """
    objects = CheckedObjects(files=files, prefix=index.prefix, objects=index.objects)
    objects.read("zarr.json")  # nothing in it is needed here, but a damaged one would mislead others
    table = with_all_columns(index.table)
    lengths = _lengths(table)
    buffers = Buffers() if buffers is None else buffers
    record_arrays = RecordArrays.of(manifest)
    arrays = {
        layout.name: _read_array(objects, layout, lengths[layout.axis], buffers) for layout in record_arrays.layouts
    }
    samples = table.filter(pc.equal(table["status"], OK)).select(_COLUMNS).to_pylist()
    return DecodedShard(number=index.shard, record_arrays=record_arrays, arrays=arrays, samples=samples)


def _read_array(objects: CheckedObjects, layout: ArrayLayout, length: int, buffers: Buffers) -> ChunkedArray:
    described = f"{layout.name}/zarr.json"
    stored = StoredArray.of(objects.where(described), objects.read(described), layout, length)
    names = [f"{layout.name}/{name}" for name in stored.chunk_names()]
    chunks = buffers.empty((len(names), *stored.chunk), layout.dtype)
    for name, chunk in zip(names, chunks, strict=True):
        stored.decode(objects.where(name), objects.read(name), chunk)
    return ChunkedArray(layout=layout, chunks=chunks)


def _lengths(table: pa.Table) -> dict[Axis, int]:
    """Elements along each axis of the shard's arrays, as the index has them: vision tokens that several rows share
    count once."""
    lengths: dict[Axis, int] = {axis: pc.sum(table[f"{axis}_count"]).as_py() or 0 for axis in AXES}
    return lengths | {"vision": n_stored_vision(table)}


def _runs(images: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """Where a sample's vision tokens are, [first, last) of the shard's; images that follow each other are one run."""
    runs: list[tuple[int, int]] = []
    for image in images:
        first, last = image["offset"], image["offset"] + image["count"]
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        elif image["count"]:
            runs.append((first, last))
    return runs
