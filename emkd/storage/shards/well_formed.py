"""What must hold of the rows of a shard before they are written.

A violation is a mistake in the program that captured them, not in a user's data (such rows are skipped
rows, with a reason): it is a ValueError that names the row, and nothing is written. Shape legend in
`record`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emkd.storage.manifest.manifest import Manifest
from emkd.storage.record import CapturedRow, Record


def check_plan(found: Sequence[int], number: int, manifest: Manifest) -> None:
    """ValueError unless these are the plan's rows of shard `number`."""
    expected = list(manifest.rows(number))
    if list(found) != expected:
        raise ValueError(
            f"shard {number}: its rows in the plan are {expected[0]} to {expected[-1]} in order, got "
            f"{len(found)} rows {list(found[:3])}...; give skipped rows too, with their reason"
        )


def check_row(row: CapturedRow, number: int, manifest: Manifest) -> None:
    """ValueError unless its record is well formed."""
    try:
        _check_row(row, manifest)
    except ValueError as error:
        raise ValueError(f"shard {number}, row {row.hint.row} (key {row.key!r:.20}): {error}") from error


def _check_row(row: CapturedRow, manifest: Manifest) -> None:
    if row.record is None:
        _expect(bool(row.reason), "a skipped row needs a reason")
        return
    _expect(not row.reason, f"has a record and a reason to be skipped ({row.reason})")
    _expect(bool(row.key) and row.key == row.record.key, f"its record has the key {row.record.key!r}")
    _check_shapes(row.record, manifest)
    _check_images(row.record)
    for name in ("vision", "answer"):
        ids, logits = getattr(row.record, f"{name}_ids"), getattr(row.record, f"{name}_logits")
        _check_ids(f"{name}_ids", ids, manifest.vocabulary_size)
        _check_order(name, ids, logits)
        tail = getattr(row.record, f"{name}_tail_logsumexp")
        _expect(not np.isnan(tail).any() and not np.isposinf(tail).any(), f"{name}_tail_logsumexp: not finite")
    _check_ids("text_ids", row.record.text_ids, 2**31)  # the embedding may have more rows than the LM head
    _check_ids("answer_positions", row.record.answer_positions, len(row.record.text_ids))
    _expect(bool(np.isfinite(row.record.vision_tail_mean).all()), "vision_tail_mean: not finite")


def _check_shapes(record: Record, manifest: Manifest) -> None:
    n_text, n_vision, n_answer = len(record.text_ids), len(record.vision_ids), len(record.answer_ids)
    expected = {
        "text_ids": (n_text,),
        "vision_ids": (n_vision, manifest.top_k),
        "vision_logits": (n_vision, manifest.top_k),
        "vision_tail_logsumexp": (n_vision,),
        "vision_tail_mean": (n_vision,),
        "affinity": (n_text, n_vision),
        "answer_positions": (n_answer,),
        "answer_ids": (n_answer, manifest.answer_top_k),
        "answer_logits": (n_answer, manifest.answer_top_k),
        "answer_tail_logsumexp": (n_answer,),
    }
    for name, shape in expected.items():
        found = getattr(record, name)
        kind = np.int32 if name.endswith(("ids", "positions")) else np.float32
        _expect(found.shape == shape, f"{name} has shape {found.shape}, expected {shape}")
        _expect(found.dtype == kind, f"{name} is {found.dtype}, expected {np.dtype(kind)}")


def _check_images(record: Record) -> None:
    """The spans of the images follow each other and make up all the vision tokens, in order of the text."""
    start, position = 0, 0
    for i, span in enumerate(record.images):
        _expect(span.start == start and span.count >= 0, f"image {i} starts at {span.start}, not at {start}")
        inside = position <= span.text_position <= len(record.text_ids)
        _expect(inside, f"image {i} stands at text position {span.text_position}, after one at {position}")
        start, position = start + span.count, span.text_position
    n_vision = len(record.vision_ids)
    _expect(start == n_vision, f"its images have {start} vision tokens, its logits {n_vision}")


def _check_ids(name: str, ids: NDArray[np.int32], end: int) -> None:
    if ids.size:
        low, high = int(ids.min()), int(ids.max())
        _expect(low >= 0 and high < end, f"{name} from {low} to {high}, expected 0 to {end - 1}")


def _check_order(name: str, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> None:
    """Descending logits, equal ones by ascending id, the first one finite. A NaN is in no order."""
    _expect(bool(np.isfinite(logits[:, 0]).all()), f"{name}_logits: the largest of a token is not finite")
    left, right = logits[:, :-1], logits[:, 1:]
    ordered = (left > right) | ((left == right) & (ids[:, :-1] < ids[:, 1:]))
    _expect(bool(ordered.all()), f"{name}_logits: not in descending order, equal ones by ascending id")


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
