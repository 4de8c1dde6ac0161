"""The rows of a shard's index, built while its records are written."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from emkd.storage.arrays.layout import AXES, IndexedAxis
from emkd.storage.index.table import OK, SKIPPED, TEXT_COLUMN, count_column, images_to_json, index_schema, offset_column
from emkd.storage.record import CapturedRow, Record


def index_row(
    row: CapturedRow, shard: int, starts: dict[IndexedAxis, int], image_offsets: Sequence[int]
) -> dict[str, Any]:
    """Return one row of an index.

    starts:        position of the record's first element along each axis of the shard's arrays
    image_offsets: position of each image's first vision token
    """
    record = row.record
    counts = _counts(record)
    found = {
        "row": row.hint.row,
        "id": row.hint.id,
        "key": row.key,
        TEXT_COLUMN: row.text_sha256,
        "status": SKIPPED if record is None else OK,
        "reason": row.reason,
        "detail": row.detail,
        "shard": shard,
        "images": [] if record is None else images_to_json(record.images, image_offsets),
        "retained_mass": None if record is None else retained_mass(record),
    }
    for axis in AXES:
        found[offset_column(axis)] = 0 if record is None else starts[axis]
        found[count_column(axis)] = counts[axis]
    return found


def index_table(rows: Sequence[dict[str, Any]], format_version: int) -> pa.Table:
    """Return rows from index_row as the table of an index."""
    return pa.Table.from_pylist(list(rows), schema=index_schema(format_version))


def _counts(record: Record | None) -> dict[IndexedAxis, int]:
    """Return the number of a record's elements along each axis; all 0 for a skipped row."""
    if record is None:
        return dict.fromkeys(AXES, 0)
    n_text, n_vision, n_answer = len(record.text_ids), len(record.vision), len(record.answer)
    n_pairs = 0 if record.affinity is None else n_text * n_vision
    return {"text": n_text, "vision": n_vision, "affinity": n_pairs, "answer": n_answer}


def retained_mass(record: Record) -> float | None:
    """Return the mean over the vision tokens of the softmax mass of the stored ids; None without vision tokens."""
    return float(record.vision.retained_mass().mean()) if len(record.vision) else None
