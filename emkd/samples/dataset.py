"""Datasets: Parquet files or LLaVA-style JSON/JSONL, as rows numbered from 0 in a fixed order.

    Dataset.open("data/*.parquet") -> .n_rows, .fingerprint -> .sample(17) -> Sample

Parquet needs the columns `images` (list of {bytes, path}) and `messages` (list of {role, content}), and may
have `id`. JSON and JSONL rows have `conversations` (list of {from, value}) or `messages`, and may have `id`
and `image` or `images` (paths below the image root). Files are taken in the order of their names.

Opening reads file footers and line starts only; an image is touched when its row is.
"""

import glob
import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.errors import DataFormatError, InputNotFoundError, SampleError, UsageError
from emkd.samples.images import read_image_bytes
from emkd.samples.sample import Sample, check_image_count, parse_turns, sample_key

SUFFIXES = (".parquet", ".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file: its name (without folders, so that a moved dataset stays the same), rows and bytes."""

    name: str
    n_rows: int
    n_bytes: int
    digest: str  # see sampled_sha256; of the whole file where it is JSON


def sampled_sha256(path: Path, block: int = 1 << 16, n_blocks: int = 256) -> str:
    """SHA-256 of a file of up to 16 MB, of 256 blocks spread over a larger one, the first and the last included.

    Enough to notice another file in no time, whatever its size; what vouches for a row is its key.
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


class _Source(Protocol):
    path: Path
    n_rows: int

    def digest(self) -> str: ...
    def row(self, index: int) -> dict[str, Any]: ...


class _ParquetSource:
    """Rows of one Parquet file; the last few row groups stay decoded, because rows are read in runs."""

    KEPT_GROUPS = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)  # where it has checksums
        except (OSError, ValueError) as error:
            raise DataFormatError(f"{path} is not a readable Parquet file: {error}") from error
        names = self._file.schema_arrow.names
        if "messages" not in names:
            raise DataFormatError(f"{path} has no column 'messages'; it has {names}. See docs/data.md")
        if "image" in names and "images" not in names:
            raise DataFormatError(f"{path} has a column 'image'; rename it to 'images', a list for each row")
        self._columns = [name for name in ("id", "images", "messages") if name in names]
        self.n_rows = self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._groups: OrderedDict[int, list[dict[str, Any] | SampleError]] = OrderedDict()

    def digest(self) -> str:
        return sampled_sha256(self.path)

    def row(self, index: int) -> dict[str, Any]:
        group = bisect_right(self._starts, index) - 1
        if group not in self._groups:
            self._groups[group] = _rows_of(self._read(group))
            if len(self._groups) > self.KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        found = self._groups[group][index - self._starts[group]]
        if isinstance(found, SampleError):
            raise SampleError(found.reason, found.detail)
        return found

    def _read(self, group: int) -> pa.Table:
        """The row group. The footer of a damaged file may be whole, so that damage is first seen here."""
        expected = self._starts[group + 1] - self._starts[group]
        try:
            table = self._file.read_row_group(group, columns=self._columns)
            if table.num_rows != expected:
                raise pa.ArrowInvalid(f"{table.num_rows} rows, the footer says {expected}")
        except (OSError, pa.ArrowException) as error:
            # Arrow tells of damaged pages by an OSError, too, but one without the number of a system call's error.
            if isinstance(error, OSError) and error.errno:
                raise OSError(error.errno, f"{self.path}, row group {group}: {error}") from error
            if isinstance(error, MemoryError):
                raise
            raise DataFormatError(
                f"{self.path}: row group {group} (rows {self._starts[group]} to {self._starts[group + 1] - 1}) of "
                f"{self._file.num_row_groups} is damaged: {' '.join(str(error).split())}. Copy or download the file "
                "again, or write it anew without these rows"
            ) from error
        return table


def _rows_of(table: pa.Table) -> list[dict[str, Any] | SampleError]:
    """The rows as Python objects. A row whose text is not UTF-8, which Parquet does not check, costs no other."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        return [_row_of(table.slice(index, 1)) for index in range(table.num_rows)]


def _row_of(table: pa.Table) -> dict[str, Any] | SampleError:
    try:
        return dict(table.to_pylist()[0])
    except UnicodeDecodeError as error:
        return SampleError("bad-content", f"the row has a text that is not valid UTF-8: {error.reason}")


class _JsonSource:
    """Rows of one JSON array or JSONL file, kept as text or parsed as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_bytes()
        self._digest = hashlib.sha256(text).hexdigest()
        try:
            rows = (
                json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
            )
        except ValueError as error:
            raise DataFormatError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataFormatError(f"{path} must hold a list of objects, one per sample. See docs/data.md")
        self._rows: list[dict[str, Any]] = rows
        self.n_rows = len(rows)

    def digest(self) -> str:
        return self._digest

    def row(self, index: int) -> dict[str, Any]:
        return self._rows[index]


class Dataset:
    """Rows of all files of DATA. Pickles by name, so that loader workers open files of their own."""

    def __init__(self, data: str, image_root: Path | None = None) -> None:
        self.data, self.image_root = data, image_root
        paths = find_files(data)
        if image_root is not None and not image_root.is_dir():
            raise InputNotFoundError(f"--image-root {image_root} is not a folder")
        if image_root is None and any(path.suffix != ".parquet" for path in paths):
            raise UsageError(f"{data}: JSON names images by path; say where they lie with --image-root FOLDER")
        self._sources: list[_Source] = [
            _ParquetSource(path) if path.suffix == ".parquet" else _JsonSource(path) for path in paths
        ]
        self._starts = [0]
        for source in self._sources:
            self._starts.append(self._starts[-1] + source.n_rows)
        if self.n_rows == 0:
            raise DataFormatError(f"{data} holds no rows")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Dataset, (self.data, self.image_root))

    @property
    def n_rows(self) -> int:
        return self._starts[-1]

    @cached_property
    def files(self) -> list[DataFile]:
        return [
            DataFile(name=s.path.name, n_rows=s.n_rows, n_bytes=s.path.stat().st_size, digest=s.digest())
            for s in self._sources
        ]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and digests of the files, in order."""
        listing = [[f.name, f.n_rows, f.n_bytes, f.digest] for f in self.files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def raw_row(self, row: int) -> dict[str, Any]:
        """The row as its file has it. Raises SampleError where a text of it is not text, DataFormatError, OSError."""
        source = bisect_right(self._starts, row) - 1
        return self._sources[source].row(row - self._starts[source])

    def row_id(self, row: int) -> str:
        """The row's own id, "" where it has none. A lone surrogate is escaped: the index could not store it."""
        value = self.raw_row(row).get("id")
        return "" if value is None else str(value).encode(errors="backslashreplace").decode()

    def sample(self, row: int) -> Sample:
        """The row as a Sample, its images read but not decoded. Raises SampleError where it cannot be used."""
        raw = self.raw_row(row)
        turns = parse_turns(raw.get("messages") or raw.get("conversations") or [])
        entries = raw.get("images") or raw.get("image") or []
        entries = entries if isinstance(entries, list) else [entries]  # LLaVA names a single image without a list
        check_image_count(turns, len(entries))
        images = tuple(read_image_bytes(entry, self.image_root) for entry in entries)
        return Sample(row=row, id=self.row_id(row), key=sample_key(turns, images), turns=turns, images=images)

    def keyed_rows(self) -> Iterator[tuple[int, str | None]]:
        """(row, key) of every row; None where a row cannot be read. Reads everything: slow on purpose."""
        for row in range(self.n_rows):
            yield row, self.key(row)

    def key(self, row: int) -> str | None:
        """The key of a row; None where it cannot be read."""
        try:
            return self.sample(row).key
        except SampleError:
            return None


def find_files(data: str) -> list[Path]:
    """Files of a path, a folder or a glob, by name. Raises InputNotFoundError, DataFormatError."""
    path = Path(data)
    if path.is_dir():
        paths = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES]
        # A folder of Parquet may have JSON beside it that describes it (dataset_info.json and the like).
        paths = [p for p in paths if p.suffix == ".parquet"] or paths
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(p) for p in sorted(glob.glob(data))]
    if not paths:
        raise InputNotFoundError(
            f"no data at {data}: expected a {', '.join(SUFFIXES)} file, a folder of them, or a glob"
        )
    strange = [str(p) for p in paths if p.suffix not in SUFFIXES]
    if strange:
        raise DataFormatError(f"{strange[0]} is none of {', '.join(SUFFIXES)}")
    return paths
