"""Datasets: Parquet files or LLaVA-style JSON/JSONL, as rows numbered from 0 in a fixed order.

    Dataset("data/*.parquet") -> .n_rows, .fingerprint -> .row(17) -> ParsedRow -> .sample() -> Sample

A row has `messages` (list of {role, content}) or `conversations` (list of {from, value}), and may have `id` and
`images` or `image`: in Parquet {bytes, path}, in JSON and JSONL paths below the image root. Files are read in the order
of their names.

Opening a dataset reads the footers of Parquet files and the whole of JSON files (see sources.py). Images are read with
their row; `text_hashes` reads the texts of all rows without any image.
"""

import glob
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emkd.errors import DataFormatError, InputNotFoundError, SampleError, UsageError
from emkd.samples.row import ParsedRow, text_hash
from emkd.samples.sample import Sample
from emkd.samples.sources import JsonSource, ParquetSource, RawRow, Source

SUFFIXES = (".parquet", ".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file: its name (without folders, so that a dataset may be moved), rows and bytes."""

    name: str
    n_rows: int
    n_bytes: int
    digest: str  # see sampled_sha256; of the whole file if it is JSON


class Dataset:
    """The rows of all files that `data` names. Pickles by name, so that each loader worker opens the files itself.

    data:       a file, a folder or a glob
    image_root: the folder that image paths start from

    Raises InputNotFoundError, DataFormatError, and UsageError for JSON without an image root.
    """

    def __init__(self, data: str, image_root: Path | None = None) -> None:
        self.data, self.image_root = data, image_root
        paths = find_files(data)
        if image_root is not None and not image_root.is_dir():
            raise InputNotFoundError(f"--image-root {image_root} is not a folder")
        if image_root is None and any(path.suffix != ".parquet" for path in paths):
            raise UsageError(f"{data}: JSON names images by path; name their folder with --image-root FOLDER")
        self._sources: list[Source] = [
            ParquetSource(path) if path.suffix == ".parquet" else JsonSource(path) for path in paths
        ]
        self._starts = [0]
        for source in self._sources:
            self._starts.append(self._starts[-1] + source.n_rows)
        if self.n_rows == 0:
            raise DataFormatError(f"{data} has no rows")

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
        """SHA-256 of the names, sizes and digests of the files, in order."""
        listing = [[f.name, f.n_rows, f.n_bytes, f.digest] for f in self.files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def row(self, row: int) -> ParsedRow:
        """Read and parse one row; its images are read by `ParsedRow.sample`. Raises DataFormatError, OSError."""
        source = bisect_right(self._starts, row) - 1
        try:
            raw: RawRow | SampleError = self._sources[source].row(row - self._starts[source])
        except SampleError as error:
            raw = error
        return ParsedRow.of(row, raw, self.image_root)

    def sample(self, row: int) -> Sample:
        """The row as a Sample, its images read but not decoded. Raises SampleError if it cannot be used."""
        return self.row(row).sample()

    def text_hashes(self) -> Iterator[str]:
        """Yield the `text_sha256` of every row, in order; reads all texts and no image.

        Raises DataFormatError, OSError.
        """
        for source in self._sources:
            for raw in source.texts():
                yield text_hash(raw)

    def keyed_rows(self) -> Iterator[tuple[int, str | None]]:
        """Yield (row, key) for every row, with the key None if the row cannot be read. Slow: reads every image."""
        for row in range(self.n_rows):
            yield row, self.key(row)

    def key(self, row: int) -> str | None:
        """The key of a row, or None if it cannot be read."""
        try:
            return self.sample(row).key
        except SampleError:
            return None


def find_files(data: str) -> list[Path]:
    """The files of a path, a folder or a glob, sorted by name. Raises InputNotFoundError, DataFormatError."""
    path = Path(data)
    if path.is_dir():
        paths = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES]
        # A folder of Parquet files may have JSON files that describe it (dataset_info.json and the like).
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
        raise DataFormatError(f"{strange[0]}: unknown format; expected one of {', '.join(SUFFIXES)}")
    return paths
