"""The source of a data file, by the end of its name."""

from pathlib import Path

from emkd.samples.sources.arrow import ArrowSource
from emkd.samples.sources.find import format_of
from emkd.samples.sources.json_rows import JsonSource
from emkd.samples.sources.parquet import ParquetSource
from emkd.samples.sources.source import Source
from emkd.samples.sources.webdataset import TarSource


def open_source(path: Path) -> Source:
    """Open a file that `find_files` has found. Raises DataFormatError, OSError."""
    kind = format_of(path)
    if kind == "parquet":
        return ParquetSource(path)
    if kind == "json":
        return JsonSource(path)
    if kind == "arrow":
        return ArrowSource(path)
    if kind == "tar":
        return TarSource(path)
    raise ValueError(f"{path}: no format of emkd")
