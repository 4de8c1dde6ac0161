"""The rows of a shard's index, made while its records are written."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from emkd.storage.arrays.layout import AXES, Axis
from emkd.storage.index.table import OK, SKIPPED, TEXT_COLUMN, images_to_json, index_schema
from emkd.storage.record import CapturedRow, Record


def index_row(row: CapturedRow, shard: int, starts: dict[Axis, int], image_offsets: Sequence[int]) -> dict[str, Any]:
    """One row of an index.

    starts: where the record's part of each axis begins;  image_offsets: where each image's vision tokens do
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
        found[f"{axis}_offset"] = 0 if record is None else starts[axis]
        found[f"{axis}_count"] = counts[axis]
    return found


def index_table(rows: Sequence[dict[str, Any]], format_version: int) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=index_schema(format_version))


def _counts(record: Record | None) -> dict[Axis, int]:
    """Elements of a record along each axis; all 0 for a skipped row."""
    if record is None:
        return dict.fromkeys(AXES, 0)
    n_text, n_vision, n_answer = len(record.text_ids), len(record.vision), len(record.answer)
    return {"text": n_text, "vision": n_vision, "affinity": n_text * n_vision, "answer": n_answer}


def retained_mass(record: Record) -> float | None:
    """Mean over the vision tokens of the softmax mass of the stored ids; None without vision tokens."""
    return float(record.vision.retained_mass().mean()) if len(record.vision) else None
