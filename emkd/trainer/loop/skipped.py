"""Rows that a run cannot train on: logged once each, counted over all ranks, limited by `max_skipped`."""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import gather_object

from emkd.errors import DataFormatError
from emkd.trainer.data.samples import Skipped
from emkd.trainer.report import log

# In a checkpoint: the rows that were skipped up to it.
SKIPPED_NAME = "skipped.json"


class SkippedRows:
    """The skipped rows of a run, the same on every rank.

    n_samples:   samples that the run trains on
    max_skipped: share of them that may be skipped
    """

    def __init__(self, n_samples: int, max_skipped: float) -> None:
        self.n_samples, self.max_skipped = n_samples, max_skipped
        self._rows: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def new(self, found: Sequence[Skipped]) -> list[Skipped]:
        """Return the rows of `found` that were not skipped before."""
        return [row for row in found if row.row not in self._rows]

    def add(self, new: list[Skipped]) -> None:
        """Add the new rows of all ranks, and log each row once.

        All ranks have to call this together. All raise DataFormatError together if more than `max_skipped` of the
        samples are skipped.
        """
        found: dict[int, Skipped] = {row.row: row for part in gather_object([new]) for row in part}
        for row in found.values():
            log(f"row {row.row} is skipped: {row.reason}: {row.detail}")
        self._rows |= found.keys()
        allowed = self.max_skipped * self.n_samples
        if len(self._rows) > allowed:
            some = "; ".join(f"row {row.row}: {row.reason}: {row.detail}" for row in list(found.values())[:3])
            raise DataFormatError(
                f"{len(self._rows)} of {self.n_samples} rows cannot be trained on, and max_skipped "
                f"{self.max_skipped:g} allows {int(allowed)}: {some}. Fix or remove these rows, or allow more with "
                "--max-skipped"
            )

    def save(self, checkpoint: Path) -> None:
        """Write the rows to SKIPPED_NAME in a checkpoint."""
        (checkpoint / SKIPPED_NAME).write_text(json.dumps(sorted(self._rows)))

    def restore(self, checkpoint: Path) -> None:
        """Replace the rows by those of a checkpoint."""
        self._rows = set(json.loads((checkpoint / SKIPPED_NAME).read_text()))
