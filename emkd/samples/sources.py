"""The rows of one dataset file: Parquet, a JSON array, or JSONL.

Opening a Parquet file reads its footer; opening a JSON file (which has no images) reads all of it. Rows are Python
objects with the columns that docs/data.md names; `texts` yields them without images, which it does not read.
"""

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.errors import DataFormatError, SampleError

RawRow = dict[str, Any]

# Either name works, in Parquet as in JSON; if a row has both, the first one counts.
CONVERSATION_COLUMNS = ("messages", "conversations")
IMAGE_COLUMNS = ("images", "image")

_SEE = (
    "Expected one row for each sample: messages, a list of {role, content}, or conversations, a list of {from, value}; "
    "and images, if it has any"
)


def sampled_sha256(path: Path, block: int = 1 << 16, n_blocks: int = 256) -> str:
    """SHA-256 of a file of up to 16 MB; of a larger file, of 256 blocks spread over it from the first to the last.

    Detects a different file quickly, at any size; the content of a row is guaranteed by its key.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= block * n_blocks:
            return hashlib.sha256(file.read()).hexdigest()
        for number in range(n_blocks):
            file.seek((size - block) * number // (n_blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


class Source(Protocol):
    """One file of a dataset. `row` raises a SampleError if a single row cannot be read; `texts` yields it."""

    path: Path
    n_rows: int

    def digest(self) -> str: ...
    def row(self, index: int) -> RawRow: ...
    def texts(self) -> Iterator[RawRow | SampleError]: ...


class ParquetSource:
    """Rows of one Parquet file; the last few row groups stay in memory, because rows are read in sequence."""

    KEPT_GROUPS = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)  # if it has checksums
        except (OSError, ValueError) as error:
            raise DataFormatError(f"{path} is not a readable Parquet file: {error}") from error
        names = self._file.schema_arrow.names
        self._text_columns = [name for name in CONVERSATION_COLUMNS if name in names]
        if not self._text_columns:
            raise DataFormatError(
                f"{path} has no column {' or '.join(map(repr, CONVERSATION_COLUMNS))}; it has {names}. {_SEE}"
            )
        self._columns = [name for name in ("id", *IMAGE_COLUMNS) if name in names] + self._text_columns
        self.n_rows = self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def digest(self) -> str:
        return sampled_sha256(self.path)

    def row(self, index: int) -> RawRow:
        group = bisect_right(self._starts, index) - 1
        if group not in self._groups:
            self._groups[group] = self._read(group, self._columns)
            if len(self._groups) > self.KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        found = _row_of(self._groups[group].slice(index - self._starts[group], 1))
        if isinstance(found, SampleError):
            raise found
        return found

    def texts(self) -> Iterator[RawRow | SampleError]:
        for group in range(self._file.num_row_groups):
            yield from _rows_of(self._read(group, self._text_columns))

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        """Read a row group. The footer of a damaged file may be intact, so that damage shows only here."""
        expected = self._starts[group + 1] - self._starts[group]
        try:
            table = self._file.read_row_group(group, columns=columns)
            if table.num_rows != expected:
                raise pa.ArrowInvalid(f"{table.num_rows} rows, the footer says {expected}")
        except (OSError, pa.ArrowException) as error:
            # Arrow raises an OSError for damaged pages, too, but without the errno of a failed system call.
            if isinstance(error, OSError) and error.errno:
                raise OSError(error.errno, f"{self.path}, row group {group}: {error}") from error
            if isinstance(error, MemoryError):
                raise
            raise DataFormatError(
                f"{self.path}: row group {group} (rows {self._starts[group]} to {self._starts[group + 1] - 1}) of "
                f"{self._file.num_row_groups} is damaged: {' '.join(str(error).split())}. Copy or download the file "
                "again, or rewrite it without these rows"
            ) from error
        return table


def _rows_of(table: pa.Table) -> list[RawRow | SampleError]:
    """The rows as Python objects. Parquet does not check that text is UTF-8: such a row affects no other row."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        return [_row_of(table.slice(index, 1)) for index in range(table.num_rows)]


def _row_of(table: pa.Table) -> RawRow | SampleError:
    try:
        return dict(table.to_pylist()[0])
    except UnicodeDecodeError as error:
        return SampleError("bad-content", f"the row has a text that is not valid UTF-8: {error.reason}")


class JsonSource:
    """Rows of one JSON array or JSONL file, all of them in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        self._digest = hashlib.sha256(data).hexdigest()
        self._rows: list[RawRow] = _json_rows(path, data) if path.suffix == ".json" else list(_jsonl_rows(path, data))
        self.n_rows = len(self._rows)

    def digest(self) -> str:
        return self._digest

    def row(self, index: int) -> RawRow:
        return self._rows[index]

    def texts(self) -> Iterator[RawRow | SampleError]:
        return iter(self._rows)


def _json_rows(path: Path, data: bytes) -> list[RawRow]:
    found = _parsed(path, data)
    if not isinstance(found, list):
        raise DataFormatError(f"{path} must hold a list of objects, one per sample; it is {_kind(found)}. {_SEE}")
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise DataFormatError(f"{path}, row {number}: is {_kind(row)}, expected an object. {_SEE}")
    return found


def _jsonl_rows(path: Path, data: bytes) -> Iterator[RawRow]:
    """A row for each line that is not blank."""
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        row = _parsed(path, line, number)
        if not isinstance(row, dict):
            raise DataFormatError(f"{path}, line {number}: is {_kind(row)}, expected an object, one per sample. {_SEE}")
        yield row


def _parsed(path: Path, data: bytes, line: int | None = None) -> Any:
    """Parse a JSON file, or one line of a JSONL file. Raises DataFormatError with line and column.

    line: 1-based, of a JSONL file
    """
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        hint = "; one object per line is JSONL: name the file .jsonl" if error.msg == "Extra data" else ""
        where = f"line {line or error.lineno}, column {error.colno}"
        raise DataFormatError(f"{path}, {where}: not valid JSON: {error.msg}{hint if line is None else ''}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of too many digits, nested too deeply
        where = "" if line is None else f", line {line}"
        raise DataFormatError(f"{path}{where}: not valid JSON: {error}") from error


def _kind(value: Any) -> str:
    """The type of a value, as JSON names it."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
