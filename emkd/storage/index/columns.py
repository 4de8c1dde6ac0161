"""The rows of all shards in a reader's memory: columns that are decoded on first use.

Opening a cache and finding a sample use few columns. For a million rows, decoding the hashes of texts and the images
takes half of the time of decoding a consolidated index; training needs them when it compares the first shard,
inspection never.

This module avoids Arrow's conversions from and to Python and NumPy when it can: the first conversion imports pandas,
which takes longer than opening a cache.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError
from emkd.storage.index.parquet_sizes import check_parquet
from emkd.storage.index.table import (
    INDEX_SCHEMA,
    MAY_BE_NULL,
    OK,
    TEXT_COLUMN,
    images_with_offsets,
    offset_column,
    schema_of,
    with_all_columns,
)
from emkd.storage.objects.digest import NEXT_STEP

PREFIX_BYTES = 8
_AT_ONCE = ("id", "key", "status", "shard")  # what opening a cache and finding a sample need


class Rows:
    """All rows of INDEX_SCHEMA, in plan order; `rows[name]` is a column. Use `of` or `read`.

    key_prefixes: [rows] the first PREFIX_BYTES bytes of each key as a number, padded with zeros; a search reads these,
                  an eighth of the keys' memory
    """

    def __init__(self, columns: dict[str, pa.ChunkedArray], n_rows: int, parquet: tuple[str, bytes] | None) -> None:
        self._columns, self._n_rows, self._parquet = columns, n_rows, parquet
        if parquet is not None:
            self._decode(_AT_ONCE)
        # Computed now, so that the first search is as fast as later searches.
        self.key_prefixes = np.concatenate([np.zeros(0, np.uint64), *map(_prefixes, self["key"].chunks)])

    @classmethod
    def of(cls, table: pa.Table) -> "Rows":
        """Return the rows of a table in memory."""
        whole = with_all_columns(table).combine_chunks()
        return cls(dict(zip(whole.column_names, whole.columns, strict=True)), len(whole), None)

    @classmethod
    def read(cls, where: str, data: bytes) -> "Rows":
        """Return the rows of a consolidated index from its bytes, which were checked before.

        Raises DamagedCacheError, now or on first use of a column, if the bytes are not those of an index.
        """
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            check_parquet(where, data, file, ())
            found, n_rows = file.schema_arrow, file.metadata.num_rows
        except DamagedCacheError:
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            raise _not_as_written(where, error) from error
        schema = schema_of(found)
        if schema is None:
            raise DamagedCacheError(f"{where}: its columns are not the columns of an index. {NEXT_STEP}")
        missing = TEXT_COLUMN not in schema.names
        columns = {TEXT_COLUMN: pa.chunked_array([pa.nulls(n_rows, pa.string())])} if missing else {}
        return cls(columns, n_rows, (where, data))

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            self._decode((name,))
        return self._columns[name]

    def _decode(self, names: tuple[str, ...]) -> None:
        if self._parquet is None:
            raise KeyError(f"{names}: expected columns of {INDEX_SCHEMA.names}")
        where, data = self._parquet
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            check_parquet(where, data, file, names)
            table = file.read(columns=list(names), use_threads=False)
            table.validate(full=True)
            nulls = [name for name in names if name not in MAY_BE_NULL and table[name].null_count]
            if nulls or len(table) != self._n_rows:
                raise ValueError(f"nulls in {nulls}, {len(table)} rows of {self._n_rows}")
        except DamagedCacheError:
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            raise _not_as_written(where, error) from error
        if "images" in names and table.schema.field("images").type != INDEX_SCHEMA.field("images").type:
            images = images_with_offsets(table["images"], self[offset_column("vision")])
            table = table.set_column(table.column_names.index("images"), "images", images)
        try:
            table = table.select(list(names)).cast(pa.schema([INDEX_SCHEMA.field(name) for name in names]))
        except (pa.ArrowException, ValueError) as error:
            raise _not_as_written(where, error) from error
        self._columns.update(zip(names, table.columns, strict=True))
        if len(self._columns) == len(INDEX_SCHEMA):
            self._parquet = None  # every column is decoded

    def numbers(self, name: str) -> NDArray[Any]:
        """Return a column of numbers without nulls, [rows], in its own type. Read-only."""
        return as_numpy(self[name])

    def table(self, first: int = 0, last: int | None = None) -> pa.Table:
        """Return all columns of the rows at positions [first, last)."""
        table = pa.Table.from_arrays([self[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)
        return table.slice(first, None if last is None else last - first)

    @cached_property
    def is_sample(self) -> pa.ChunkedArray:
        """[rows] bool: whether the row is a sample (not skipped)."""
        return pc.equal(self["status"], text_scalar(OK))

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """[samples] position of each sample in these rows, ascending; the sample number is the index here."""
        return as_numpy(pc.indices_nonzero(self.is_sample)).astype(np.int64)

    def skipped(self, columns: Sequence[str]) -> pa.Table:
        """Return some columns of the skipped rows."""
        mask = pc.invert(self.is_sample)
        return pa.table({name: self[name].filter(mask) for name in columns}).combine_chunks()

    def of_shard(self, shard: int) -> pa.Table:
        """Return all columns of the rows of a shard, which are adjacent."""
        first, last = np.searchsorted(self.numbers("shard"), [shard, shard + 1]).tolist()
        return self.table(first, last)


def as_numpy(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """Return a column of n numbers without nulls as an array [n], without a copy if the column has one chunk."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    arrays = [np.from_dlpack(chunk) for chunk in chunks if len(chunk)]
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate([np.zeros(0, column.type.to_pandas_dtype()), *arrays])


def text_scalar(text: str) -> pa.Scalar:
    """As pa.scalar, which imports pandas. A text that is not valid UTF-8 equals no text of a column."""
    data = text.encode(errors="surrogatepass")
    offsets = pa.py_buffer(np.array([0, len(data)], np.int32))
    return pa.StringArray.from_buffers(1, offsets, pa.py_buffer(data))[0]


def prefix_range(text: str) -> tuple[int, int]:
    """Return the smallest and the largest value in `Rows.key_prefixes` of a key that starts with `text`."""
    data = text.encode(errors="surrogatepass")[:PREFIX_BYTES]
    low, high = data.ljust(PREFIX_BYTES, b"\x00"), data.ljust(PREFIX_BYTES, b"\xff")
    return int.from_bytes(low), int.from_bytes(high)


def _prefixes(keys: pa.StringArray) -> NDArray[np.uint64]:
    _, offsets_buffer, data_buffer = keys.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32, len(keys) + 1, offset=4 * keys.offset)
    starts, lengths = offsets[:-1], np.diff(offsets)
    n_bytes = int(offsets[-1])
    whole = starts <= n_bytes - PREFIX_BYTES  # after the start of any other key, the buffer has fewer bytes
    prefixes = np.zeros(len(keys), np.uint64)
    if whole.any():
        data = np.frombuffer(data_buffer, np.uint8, n_bytes)
        windows = np.ndarray((n_bytes - PREFIX_BYTES + 1,), ">u8", data, strides=(1,))
        prefixes[whole] = windows[starts[whole]]
    for i in np.flatnonzero(~whole & (lengths > 0)).tolist():
        prefixes[i] = prefix_range(keys[i].as_py())[0]
    return _padded(prefixes, lengths)


def _padded(prefixes: NDArray[np.uint64], lengths: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Pad keys that are shorter than a prefix: replace the bytes of the next key with zeros."""
    short = lengths < PREFIX_BYTES
    if short.any():
        masks = np.array([2**64 - 2 ** (64 - 8 * n) for n in range(PREFIX_BYTES)], np.uint64)
        prefixes[short] &= masks[lengths[short]]
    return prefixes


def _not_as_written(where: str, error: BaseException) -> DamagedCacheError:
    return DamagedCacheError(f"{where}: not a readable Parquet file ({error}). {NEXT_STEP}")
