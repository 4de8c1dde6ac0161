"""The rows of a shard as the teacher's inputs, read while the teacher works on the previous shard.

    rows --Dataset, Encoder--> RowReader --Teacher.captured--> records

Decoding images and preparing pixels may take as long as the teacher's pass, on a CPU that has little else to do.
A row that cannot be used becomes a CapturedRow with its reason, and affects no other row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from emkd.errors import SampleError
from emkd.pipeline.out_of_memory import OUT_OF_MEMORY, rows_that_fit
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded, Encoder
from emkd.storage.record import CapturedRow, Record, RowHint


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row encoded as the teacher's inputs."""

    hint: RowHint
    text_sha256: str
    encoded: Encoded

    def captured(self, record: Record) -> CapturedRow:
        """Return the row with the teacher's record."""
        return CapturedRow(
            hint=self.hint,
            key=self.encoded.key,
            record=record,
            text_sha256=self.text_sha256,
            image_keys=self.encoded.image_keys,
        )

    def skipped(self, error: SampleError) -> CapturedRow:
        """The row without a record, and why."""
        return CapturedRow(
            hint=self.hint,
            key=self.encoded.key,
            record=None,
            reason=error.reason,
            detail=error.detail,
            text_sha256=self.text_sha256,
            image_keys=self.encoded.image_keys,
        )


class RowReader:
    """Some rows of a dataset, read as far as `advance` got.

    usable:  the teacher's inputs, in the order of the rows
    skipped: the rows that cannot be used
    n_bytes: of the usable rows' tensors, nearly all of it pixels
    """

    def __init__(self, encoder: Encoder, dataset: Dataset, rows: Iterable[int]) -> None:
        self._encoder, self._dataset, self._rows = encoder, dataset, list(rows)
        self._n_read = 0
        self.usable: list[EncodedRow] = []
        self.skipped: list[CapturedRow] = []
        self.n_bytes = 0
        self.stopped = False  # another thread sets it: `advance` returns after the current row

    def advance(self, limit: int | None = None) -> None:
        """Read on to the last row.

        limit: bytes; returns early once more bytes than this are held, or if a row does not fit the memory that the
            teacher's pass leaves: that row is not skipped, the next call reads it again
        """
        while self._n_read < len(self._rows) and not self.stopped and (limit is None or self.n_bytes <= limit):
            found = read_row(self._encoder, self._dataset, self._rows[self._n_read])
            if isinstance(found, CapturedRow):
                if limit is not None and found.reason == OUT_OF_MEMORY:
                    return
                self.skipped.append(found)
            else:
                self.usable.append(found)
                self.n_bytes += found.encoded.n_bytes
            self._n_read += 1


def read_row(encoder: Encoder, dataset: Dataset, row: int) -> EncodedRow | CapturedRow:
    """A row as the teacher's inputs, or without a record and why."""
    parsed = dataset.row(row)
    hint, text, key = RowHint(row=row, id=parsed.id), parsed.text_sha256, ""
    try:
        with rows_that_fit():
            sample = parsed.sample()
            key = sample.key
            return EncodedRow(hint=hint, text_sha256=text, encoded=encoder(sample))
    except SampleError as error:
        return CapturedRow(hint=hint, key=key, record=None, reason=error.reason, detail=error.detail, text_sha256=text)
