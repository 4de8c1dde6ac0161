"""Rows of one Parquet file.

Opening a file reads its footer. A row group is read whole if it is small, and otherwise in pieces of about PIECE_BYTES:
pyarrow's default writer puts a million rows into a group, and a group with more than 2 GB of pictures does not fit one
Arrow array. The pieces read last stay in memory, up to KEPT_BYTES, because rows are read in sequence.

A row group can only be read from its beginning. Rows in order therefore cost one pass; going back to an earlier piece
that is no longer in memory costs a new pass up to it.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.errors import DataFormatError, SampleError
from emkd.samples.sources.source import RawRow, Source
from emkd.samples.sources.tables import row_columns, row_of, rows_of, text_columns, unread_names

PIECE_BYTES = 128 << 20
KEPT_BYTES = 512 << 20
# A piece is read in so many batches: rows may be this much larger than their mean before one batch is too large.
BATCHES = 16
BUFFER_BYTES = 1 << 20  # of each column of a group that is read in pieces


class ParquetSource(Source):
    """Rows of one Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)  # if it has checksums
        except (OSError, ValueError) as error:
            raise DataFormatError(f"{path} is not a readable Parquet file: {error}") from error
        schema = self._file.schema_arrow
        self._text_columns, self._columns = text_columns(str(path), schema), row_columns(schema)
        self._unread = unread_names(schema)
        self.n_rows = self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._pieces: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._reading: tuple[int, int, Iterator[pa.Table]] | None = None  # row group, next piece, and those after it

    def unread(self) -> set[str]:
        return self._unread

    def row(self, index: int) -> RawRow:
        group = bisect_right(self._starts, index) - 1
        n_rows = self._piece_rows(group, self._columns)
        number, place = divmod(index - self._starts[group], n_rows)
        found = row_of(self._piece(group, number).slice(place, 1))
        if isinstance(found, SampleError):
            raise found
        return found

    def texts(self) -> Iterator[RawRow | SampleError]:
        for group in range(self._file.num_row_groups):
            for table in self._tables(group, self._text_columns):
                yield from rows_of(table)

    def _piece(self, group: int, number: int) -> pa.Table:
        """A piece of a row group, from memory or from the file; the oldest ones in memory give way first."""
        key = (group, number)
        if key not in self._pieces:
            while self._pieces and sum(table.nbytes for table in self._pieces.values()) > KEPT_BYTES - PIECE_BYTES:
                self._pieces.popitem(last=False)
            self._pieces[key] = self._read_piece(group, number)
        self._pieces.move_to_end(key)
        return self._pieces[key]

    def _read_piece(self, group: int, number: int) -> pa.Table:
        """Read on from the last piece that was read if it comes before, else from the beginning of the group."""
        at, reading = 0, None
        if self._reading is not None and self._reading[0] == group and self._reading[1] <= number:
            _, at, reading = self._reading
        self._reading = None
        tables = self._tables(group, self._columns) if reading is None else reading
        for _ in range(at, number):
            next(tables)
        table = next(tables)
        if (number + 1) * self._piece_rows(group, self._columns) < self._group_rows(group):
            self._reading = (group, number + 1, tables)
        return table

    def _group_rows(self, group: int) -> int:
        return self._starts[group + 1] - self._starts[group]

    def _piece_rows(self, group: int, columns: list[str]) -> int:
        """Rows of each piece of a row group but the last: all rows of a small group."""
        n_rows, found = self._group_rows(group), self._file.metadata.row_group(group)
        chunks = (found.column(n) for n in range(found.num_columns))
        n_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        return max(1, n_rows if n_bytes <= PIECE_BYTES else n_rows * PIECE_BYTES // n_bytes)

    def _tables(self, group: int, columns: list[str]) -> Iterator[pa.Table]:
        """Yield the pieces of a row group. The footer of a damaged file may be intact: damage shows only here."""
        expected, n_rows = self._group_rows(group), self._piece_rows(group, columns)
        seen = 0
        try:
            if n_rows >= expected:
                table = self._file.read_row_group(group, columns=columns)
                seen = table.num_rows
                _check_count(seen, expected)
                yield table
                return
            for table in self._batches(group, columns, n_rows):
                seen += table.num_rows
                yield table
            _check_count(seen, expected)
        except (OSError, pa.ArrowException) as error:
            self._raise(group, error)

    def _batches(self, group: int, columns: list[str], n_rows: int) -> Iterator[pa.Table]:
        """Yield tables of `n_rows` rows, the last one of the rest, with no more than one of them in memory.

        A buffer makes Arrow read the pages of a column one after the other; without one it reads a whole column of the
        row group at once.
        """
        file = pq.ParquetFile(self.path, page_checksum_verification=True, buffer_size=BUFFER_BYTES, pre_buffer=False)
        held: list[pa.RecordBatch] = []
        with file:
            size = max(1, n_rows // BATCHES)
            for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False):
                lacking = n_rows - sum(b.num_rows for b in held)
                held.append(batch.slice(0, lacking))
                if batch.num_rows < lacking:
                    continue
                yield pa.Table.from_batches(held)
                held = [batch.slice(lacking)] if batch.num_rows > lacking else []
            if held:
                yield pa.Table.from_batches(held)

    def _raise(self, group: int, error: Exception) -> None:
        # Arrow raises an OSError for damaged pages, too, but without the errno of a failed system call.
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, f"{self.path}, row group {group}: {error}") from error
        if isinstance(error, MemoryError):
            raise error
        first, last = self._starts[group], self._starts[group + 1] - 1
        where = f"{self.path}: row group {group} (rows {first} to {last}) of {self._file.num_row_groups}"
        if isinstance(error, NotImplementedError):
            raise DataFormatError(
                f"{where} has rows of very different sizes, so that a few of them exceed 2 GB: write it again with a "
                "smaller row_group_size"
            ) from error
        raise DataFormatError(
            f"{where} is damaged: {' '.join(str(error).split())}. Copy or download the file again, or rewrite it "
            "without these rows"
        ) from error


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise pa.ArrowInvalid(f"{found} rows, the footer says {expected}")
