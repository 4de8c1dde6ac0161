"""Checks of the rows of a shard before they are written.

A failed check is a bug in the program that captured the rows, not an error in a user's data (such rows are skipped with
a reason). It raises ValueError, which names the row, and nothing is written. `record` has the shape legend.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emkd.storage.manifest.manifest import Manifest
from emkd.storage.record import CapturedRow, Record, TopLogits


def check_plan(found: Sequence[int], shard: int, manifest: Manifest) -> None:
    """Check that `found` are the plan's rows of `shard`. Raises ValueError if not."""
    expected = list(manifest.rows(shard))
    if list(found) != expected:
        raise ValueError(
            f"shard {shard}: its rows in the plan are {expected[0]} to {expected[-1]} in order, got "
            f"{len(found)} rows {list(found[:3])}...; pass skipped rows, too, with their reason"
        )


def check_row(row: CapturedRow, shard: int, manifest: Manifest) -> None:
    """Check that a row has a well-formed record, or a reason to be skipped. Raises ValueError if not."""
    try:
        _check_row(row, manifest)
    except ValueError as error:
        raise ValueError(f"shard {shard}, row {row.hint.row} (key {row.key!r:.20}): {error}") from error


def _check_row(row: CapturedRow, manifest: Manifest) -> None:
    if row.record is None:
        _expect(bool(row.reason), "a skipped row needs a reason")
        return
    _expect(not row.reason, f"it has a record and a reason to be skipped ({row.reason})")
    _expect(bool(row.key) and row.key == row.record.key, f"its record has the key {row.record.key!r}")
    _check_shapes(row.record, manifest)
    _check_images(row.record)
    _check_top_logits("vision", row.record.vision, manifest)
    _check_top_logits("answer", row.record.answer, manifest)
    _check_ids("text_ids", row.record.text_ids, 2**31)  # the embedding may have more rows than the LM head
    _check_ids("answer_positions", row.record.answer_positions, len(row.record.text_ids))


def _check_shapes(record: Record, manifest: Manifest) -> None:
    n_text, n_vision, n_answer = len(record.text_ids), len(record.vision), len(record.answer)
    _check_array("text_ids", record.text_ids, (n_text,), np.int32)
    _check_top_logits_shapes("vision", record.vision, manifest.top_k, has_mean=True)
    _check_codes("vision.codes", record.vision.codes, n_vision, manifest, expected=manifest.has_codes("vision"))
    _check_codes("answer.codes", record.answer.codes, n_answer, manifest, expected=manifest.has_codes("answer"))
    _check_codes("text_codes", record.text_codes, n_text, manifest, expected=manifest.has_codes("text"))
    _expect((record.affinity is not None) == manifest.stores_affinity, "affinity and the manifest do not fit together")
    if record.affinity is not None:
        _check_array("affinity", record.affinity, (n_text, n_vision), np.float32)
    _check_array("answer_positions", record.answer_positions, (n_answer,), np.int32)
    _check_top_logits_shapes("answer", record.answer, manifest.answer_top_k, has_mean=False)


def _check_top_logits_shapes(name: str, top: TopLogits, k: int, *, has_mean: bool) -> None:
    _check_array(f"{name}.ids", top.ids, (len(top), k), np.int32)
    _check_array(f"{name}.logits", top.logits, (len(top), k), np.float32)
    _check_array(f"{name}.tail_logsumexp", top.tail_logsumexp, (len(top),), np.float32)
    _expect(
        (top.tail_mean is not None) == has_mean,
        f"{name}.tail_mean is {'missing' if has_mean else 'not None, but is not stored'}",
    )
    if top.tail_mean is not None:
        _check_array(f"{name}.tail_mean", top.tail_mean, (len(top),), np.float32)


def _check_codes(name: str, found: NDArray[Any] | None, n: int, manifest: Manifest, *, expected: bool) -> None:
    _expect((found is not None) == expected, f"{name} is {'missing' if expected else 'not None, but is not stored'}")
    if found is not None and manifest.basis is not None:
        _check_array(name, found, (n, manifest.basis.n_columns), np.int16, np.int8)


def _check_array(name: str, found: NDArray[Any], shape: tuple[int, ...], *kinds: type[np.generic]) -> None:
    _expect(found.shape == shape, f"{name} has shape {found.shape}, expected {shape}")
    _expect(found.dtype in kinds, f"{name} is {found.dtype}, expected {' or '.join(kind.__name__ for kind in kinds)}")


def _check_top_logits(name: str, top: TopLogits, manifest: Manifest) -> None:
    _check_ids(f"{name}.ids", top.ids, manifest.vocabulary_size)
    _check_order(name, top)
    tail = top.tail_logsumexp
    _expect(not np.isnan(tail).any() and not np.isposinf(tail).any(), f"{name}.tail_logsumexp: not finite")
    if top.tail_mean is not None:
        _expect(bool(np.isfinite(top.tail_mean).all()), f"{name}.tail_mean: not finite")


def _check_images(record: Record) -> None:
    """Check that the images are in the order of the text and that their spans partition the vision tokens in order."""
    start, position, n_text = 0, 0, len(record.text_ids)
    for i, span in enumerate(record.images):
        what = f"image {i} has {span.count} vision tokens from {span.start} on, expected 0 or more from {start} on"
        _expect(span.start == start and span.count >= 0, what)
        inside = position <= span.text_position <= n_text
        _expect(inside, f"image {i} is at text position {span.text_position}, expected {position} to {n_text}")
        start, position = start + span.count, span.text_position
    n_vision = len(record.vision)
    _expect(start == n_vision, f"its images have {start} vision tokens, its logits {n_vision}")


def _check_ids(name: str, ids: NDArray[np.int32], end: int) -> None:
    if ids.size:
        low, high = int(ids.min()), int(ids.max())
        _expect(low >= 0 and high < end, f"{name} from {low} to {high}, expected 0 to {end - 1}")


def _check_order(name: str, top: TopLogits) -> None:
    """Check that logits descend, with equal logits by ascending id, and that the first is finite. Any NaN fails."""
    ids, logits = top.ids, top.logits
    _expect(bool(np.isfinite(logits[:, 0]).all()), f"{name}.logits: the largest of a token is not finite")
    left, right = logits[:, :-1], logits[:, 1:]
    ordered = (left > right) | ((left == right) & (ids[:, :-1] < ids[:, 1:]))
    _expect(bool(ordered.all()), f"{name}.logits: not in descending order, equal ones by ascending id")


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
