"""A decoded shard in memory, and its records.

The chunks of all arrays are decompressed once and kept as stored numbers, which take half of the memory of records;
codes stay compressed until their record is asked for, because they may be many times larger than the rest. Each record
is assembled on request and shares no memory with the shard. `record` and `layout` have the shape legend.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError, SampleNotFoundError
from emkd.storage.arrays.chunks import StoredArray
from emkd.storage.arrays.kind import Arrays
from emkd.storage.arrays.layout import AXES, TOKEN_AXES, ArrayLayout, Axis, IndexedAxis, TokenAxis, frame_axes
from emkd.storage.arrays.record_arrays import RecordArrays
from emkd.storage.index.commit import ShardIndex
from emkd.storage.index.table import (
    OK,
    count_column,
    images_from_json,
    n_stored_vision,
    offset_column,
    with_all_columns,
)
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.checked import CheckedObjects
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.files import Files
from emkd.storage.objects.sizes import ALWAYS, check_explained
from emkd.storage.record import Record
from emkd.storage.shards.buffers import Buffers

Run = tuple[int, int]  # elements [first, last) along an axis

# The columns of the index that `record` needs.
_COLUMNS = ("key", "images", *map(offset_column, AXES), *map(count_column, AXES))

# So many chunks of an array are not too many to name, whatever zarr.json says.
_FEW_CHUNKS = 2**16


@dataclass(frozen=True, kw_only=True)
class ChunkedArray:
    """An array as its decompressed chunks, one after the other.

    chunks: [chunks, tokens of a chunk, ...], or [chunks, k, tokens of a chunk] if the layout is by rank; the last chunk
            may extend beyond the end of the array
    """

    layout: ArrayLayout
    chunks: NDArray[Any]

    def take(self, runs: Sequence[Run]) -> NDArray[Any]:
        """Return the tokens of `runs`, run after run; a view if they are contiguous."""
        if self.layout.by_rank:
            parts = [part for first, last in runs for part in self._by_rank(first, last)]
        else:
            parts = [self._flat[first:last] for first, last in runs]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts or [np.empty(self.layout.shape(0), self.layout.dtype)], axis=self.layout.token_axis)

    @cached_property
    def _flat(self) -> NDArray[Any]:
        """[tokens, ...] of all chunks, if the layout is not by rank."""
        return self.chunks.reshape(-1, *self.chunks.shape[2:])

    def cumulative(self) -> NDArray[np.int64]:
        """Return the sums of the numbers before each position, and of all of them, for an array with one dimension."""
        return np.concatenate([[0], np.cumsum(self._flat, dtype=np.int64)])

    def _by_rank(self, first: int, last: int) -> Iterable[NDArray[Any]]:
        """Yield the tokens [first, last), [k, tokens], from each chunk that has some of them."""
        size = self.chunks.shape[2]
        for i in range(first // size, -(-last // size)):
            yield self.chunks[i][:, max(first - i * size, 0) : min(last - i * size, size)]


@dataclass(frozen=True, kw_only=True)
class DecodedShard:
    """A shard in memory: its arrays by name, and _COLUMNS of its samples, without skipped rows.

    `position` below is the index of a sample in the shard, from 0.
    """

    shard: int
    record_arrays: RecordArrays
    arrays: dict[str, ChunkedArray]
    samples: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        """Return the number of samples in the shard."""
        return len(self.samples)

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays in bytes."""
        return sum(array.chunks.nbytes for array in self.arrays.values())

    def release(self, buffers: Buffers) -> None:
        """Give the memory of the arrays back to `buffers`. The shard is unusable afterwards."""
        for array in self.arrays.values():
            buffers.give_back(array.chunks)

    def record(self, position: int) -> Record:
        """Return the record of a sample.

        Raises SampleNotFoundError if the shard has fewer samples, DamagedCacheError if its numbers cannot be right.
        """
        if not 0 <= position < len(self):
            raise SampleNotFoundError(f"sample {position} of shard {self.shard}: it has {len(self)} samples")
        row = self.samples[position]
        try:
            fields = self.record_arrays.decode(self.stored(position))
        except DamagedCacheError as error:
            raise DamagedCacheError(f"sample {position} of shard {self.shard}: {error}") from error
        return Record(key=row["key"], images=images_from_json(row["images"]), **fields)

    def stored(self, position: int) -> Arrays:
        """Return what is stored for a sample, by array name; views if it is contiguous."""
        row = self.samples[position]
        runs: dict[Axis, list[Run]] = {axis: [_run(row, axis)] for axis in AXES}
        runs["vision"] = _image_runs(row["images"])
        for tokens, frames in self._frames.items():
            of_bytes, of_frames = frame_axes(tokens)
            runs[of_frames] = [frames.of_tokens(run) for run in runs[tokens]]
            runs[of_bytes] = [frames.to_bytes(run) for run in runs[of_frames]]
        return {name: array.take(runs[array.layout.axis]) for name, array in self.arrays.items()}

    @cached_property
    def _frames(self) -> "dict[TokenAxis, _Frames]":
        """The frames of codes, of the tokens that have codes."""
        return {
            axis: _Frames.of(self.arrays[f"{axis}_frame_tokens"], self.arrays[f"{axis}_frame_bytes"])
            for axis in TOKEN_AXES
            if f"{axis}_codes" in self.arrays
        }


@dataclass(frozen=True, kw_only=True)
class _Frames:
    """The first token and the first byte of each frame, [frames + 1] with the total at the end."""

    tokens: NDArray[np.int64]
    n_bytes: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: ChunkedArray, n_bytes: ChunkedArray) -> "_Frames":
        """Return the frames from their numbers of tokens and bytes; a chunk's padding makes empty ones at the end."""
        return cls(tokens=tokens.cumulative(), n_bytes=n_bytes.cumulative())

    def of_tokens(self, run: Run) -> Run:
        """Return the frames of whole images or samples."""
        first, last = np.searchsorted(self.tokens, run).tolist()
        return first, last if run[0] < run[1] else first

    def to_bytes(self, run: Run) -> Run:
        """Return the bytes of some frames."""
        return int(self.n_bytes[run[0]]), int(self.n_bytes[run[1]])


def read_shard(files: Files, index: ShardIndex, manifest: Manifest, buffers: Buffers | None = None) -> DecodedShard:
    """Read and check all arrays of a committed shard, into the memory of `buffers` or into new memory.

    Raises DamagedCacheError if an object is missing or changed, or if an array is not as the manifest and the index
    describe it.
    """
    objects = CheckedObjects(files=files, prefix=index.prefix, objects=index.objects)
    objects.read("zarr.json")  # not used here, but checked: a damaged one would mislead other Zarr readers
    table = with_all_columns(index.table)
    lengths = _lengths(table)
    buffers = Buffers() if buffers is None else buffers
    record_arrays = RecordArrays.of(manifest)
    described = [_described(objects, layout, lengths.get(layout.axis)) for layout in record_arrays.layouts]
    _check_memory(objects, described)
    arrays = {stored.layout.name: _read_array(objects, stored, buffers) for stored in described}
    _check_frames(objects, arrays, lengths)
    samples = table.filter(pc.equal(table["status"], OK)).select(_COLUMNS).to_pylist()
    return DecodedShard(shard=index.shard, record_arrays=record_arrays, arrays=arrays, samples=samples)


def _described(objects: CheckedObjects, layout: ArrayLayout, length: int | None) -> StoredArray:
    name = f"{layout.name}/zarr.json"
    return StoredArray.of(objects.where(name), objects.read(name), layout, length)


def _check_memory(objects: CheckedObjects, described: Sequence[StoredArray]) -> None:
    """Compare the memory of all arrays with the files on disk. Raises DamagedCacheError."""
    n_bytes = sum(stored.n_bytes for stored in described)
    if n_bytes <= ALWAYS and all(stored.n_chunks <= _FEW_CHUNKS for stored in described):
        return  # without a look at every file, which costs as much as 1 in 20 samples
    sizes = objects.files.sizes(objects.prefix)
    for stored in described:
        where = objects.where(f"{stored.layout.name}/zarr.json")
        if stored.n_chunks > len(sizes):
            raise DamagedCacheError(
                f"{where}: {stored.n_chunks:,} chunks, the shard has {len(sizes):,} files. {NEXT_STEP}"
            )
    check_explained(objects.where("zarr.json"), n_bytes, sum(sizes.values()))


def _read_array(objects: CheckedObjects, stored: StoredArray, buffers: Buffers) -> ChunkedArray:
    names = [f"{stored.layout.name}/{name}" for name in stored.chunk_names()]
    chunks = buffers.empty((len(names), *stored.chunk), stored.layout.dtype)
    for name, chunk in zip(names, chunks, strict=True):
        stored.decode(objects.where(name), objects.read(name), chunk)
    return ChunkedArray(layout=stored.layout, chunks=chunks)


def _check_frames(objects: CheckedObjects, arrays: dict[str, ChunkedArray], lengths: Mapping[Axis, int]) -> None:
    """Compare the frames of codes with the tokens and the bytes that there are. Raises DamagedCacheError."""
    for axis in TOKEN_AXES:
        if f"{axis}_codes" not in arrays:
            continue
        n_bytes = arrays[f"{axis}_codes"].chunks.size
        for what, expected in (("tokens", lengths[axis]), ("bytes", n_bytes)):
            frames = arrays[f"{axis}_frame_{what}"]
            total = int(frames.chunks.sum(dtype=np.int64))
            if (frames.chunks < 0).any() or (total != expected if what == "tokens" else total > expected):
                raise DamagedCacheError(
                    f"{objects.where(frames.layout.name)}: frames of {total:,} {what} in all, expected {expected:,}. "
                    f"{NEXT_STEP}"
                )


def _lengths(table: pa.Table) -> dict[Axis, int]:
    """Return the elements of the shard's arrays along each axis according to the index.

    Vision tokens that several rows share count once.
    """
    lengths: dict[Axis, int] = {axis: pc.sum(table[count_column(axis)]).as_py() or 0 for axis in AXES}
    return lengths | {"vision": n_stored_vision(table)}


def _run(row: dict[str, Any], axis: IndexedAxis) -> Run:
    """Return a sample's elements along an axis of the shard's arrays."""
    first = row[offset_column(axis)]
    return first, first + row[count_column(axis)]


def _image_runs(images: Iterable[dict[str, Any]]) -> list[Run]:
    """Return a sample's vision tokens among those of the shard; adjacent images make one run."""
    runs: list[Run] = []
    for image in images:
        first, last = image["offset"], image["offset"] + image["count"]
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        elif image["count"]:
            runs.append((first, last))
    return runs
