"""Rows of one Arrow IPC file, as `datasets.save_to_disk` and the cache of `datasets` have them.

The file is mapped into memory, so that only the rows that are read take some.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from emkd.errors import DataFormatError, SampleError
from emkd.samples.sources.source import RawRow, Source
from emkd.samples.sources.tables import row_columns, row_of, rows_of, text_columns, unread_names

TEXT_ROWS = 1024  # rows whose texts are Python objects at a time


class ArrowSource(Source):
    """Rows of one .arrow file, in Arrow's stream or file format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mapped = pa.memory_map(str(path))
            try:
                table = pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                mapped.seek(0)
                table = pa.ipc.open_file(mapped).read_all()
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise DataFormatError(
                f"{path} is not a readable Arrow file: {' '.join(str(error).split())}. Copy or download it again"
            ) from error
        texts = text_columns(str(path), table.schema)
        self._unread = unread_names(table.schema)
        self._table, self._texts = table.select(row_columns(table.schema)), table.select(texts)
        self.n_rows = table.num_rows

    def unread(self) -> set[str]:
        return self._unread

    def row(self, index: int) -> RawRow:
        found = row_of(self._table.slice(index, 1))
        if isinstance(found, SampleError):
            raise found
        return found

    def texts(self) -> Iterator[RawRow | SampleError]:
        for start in range(0, self.n_rows, TEXT_ROWS):
            yield from rows_of(self._texts.slice(start, TEXT_ROWS))
