"""Datasets: the rows of all data files, numbered from 0 in a fixed order.

    Dataset("data/*.parquet") -> .n_rows, .fingerprint -> .row(17) -> ParsedRow -> .sample() -> Sample

A row has `messages` (list of {role, content}) or `conversations` (list of {from, value}), and may have `id` and
`images` or `image`: {bytes, path}, base64, or paths below the image root. Files are read in the order of their names.

Opening a dataset reads the footers of Parquet files and the whole of JSON files (see sources/). Images are read with
their row; `text_hashes` reads the texts of all rows without any image.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emkd.errors import DataFormatError, InputNotFoundError, SampleError, UsageError
from emkd.samples.image_entry import ImageFolder
from emkd.samples.row import ParsedRow, text_hash
from emkd.samples.sample import Sample
from emkd.samples.sources.find import find_files
from emkd.samples.sources.open import open_source
from emkd.samples.sources.source import RawRow, Source
from emkd.text import one_line


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file: its name (without folders, so that a dataset may be moved), rows and bytes."""

    name: str
    n_rows: int
    n_bytes: int
    digest: str  # see sampled_sha256; of the whole file if it is JSON


class Dataset:
    """The rows of all files that `data` names. Pickles by name, so that each loader worker opens the files itself.

    data:         a file, a folder, a glob, or the name of a data set in the hub's local cache
    image_root:   the folder that image paths start from
    follow_links: links inside the image root may lead out of it

    Raises InputNotFoundError, DataFormatError, and UsageError for JSON that names paths without an image root.
    """

    def __init__(self, data: str, image_root: Path | None = None, follow_links: bool = False) -> None:
        self.data, self.image_root, self.follow_links = data, image_root, follow_links
        paths = find_files(data)
        if image_root is not None and not image_root.is_dir():
            raise InputNotFoundError(f"--image-root {image_root} is not a folder")
        self._sources: list[Source] = [open_source(path) for path in paths]
        if image_root is None and any(source.names_paths() for source in self._sources):
            raise UsageError(f"{data}: JSON names images by path; name their folder with --image-root FOLDER")
        self._folder = ImageFolder(path=image_root, follow_links=follow_links)
        self._starts = [0]
        for source in self._sources:
            self._starts.append(self._starts[-1] + source.n_rows)
        if self.n_rows == 0:
            raise DataFormatError(f"{data} has no rows")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Dataset, (self.data, self.image_root, self.follow_links))

    @property
    def n_rows(self) -> int:
        return self._starts[-1]

    @cached_property
    def files(self) -> list[DataFile]:
        return [
            DataFile(name=s.name, n_rows=s.n_rows, n_bytes=s.path.stat().st_size, digest=s.digest())
            for s in self._sources
        ]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names, sizes and digests of the files, in order."""
        listing = [[f.name, f.n_rows, f.n_bytes, f.digest] for f in self.files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def unread(self) -> str | None:
        """A line that names the columns and keys that are not read, None if all are. Told once, by whoever opens the
        data for a user; rows with names that would change what is learnt are skipped instead (see known.py)."""
        names = sorted(set().union(*(source.unread() for source in self._sources)))
        return one_line(f"{self.data}: not read: {', '.join(names)}") if names else None

    def row(self, row: int) -> ParsedRow:
        """Read and parse one row; its images are read by `ParsedRow.sample`. Raises DataFormatError, OSError."""
        source = bisect_right(self._starts, row) - 1
        try:
            raw: RawRow | SampleError = self._sources[source].row(row - self._starts[source])
        except SampleError as error:
            raw = error
        return ParsedRow.of(row, raw, self._folder)

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
