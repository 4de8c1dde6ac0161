"""Images that several rows of a shard show after the same text.

Instruction data ask many questions about one image, in many rows. To a causal teacher, an image does not depend on the
text that follows it: its vision tokens have the same logits in all these rows, except for rounding, which depends on
the rest of the batch. So all these rows get the logits of the first one, and the shard's writer stores equal logits
once.

Nothing is taken for granted: each row's own logits are computed and compared with the first row's, within the tolerance
for one teacher (`vlm/tolerance.py`). If they differ by more, as with a teacher whose vision tokens see the text that
follows them, the row keeps its own.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from emkd.storage.record import CapturedRow, ImageSpan, Record, TopLogits
from emkd.vlm.tolerance import UNIT, tolerance


class SharedImages:
    """Finds the images that rows of a shard share: `expect` all rows, then `apply` to one row after the other.

    dtype:       of the teacher
    n_shared:    images that took another row's logits
    n_different: images that should have taken them, but differed and kept their own

    The first row's logits of an image are held until the last row that shows it.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.n_shared = self.n_different = 0
        self._to_come: Counter[str] = Counter()
        self._first: dict[str, TopLogits] = {}

    def expect(self, keys: Iterable[str]) -> None:
        """Announce rows with these images (`Encoded.image_keys`)."""
        self._to_come.update(keys)

    def unify(self, record: Record, keys: Sequence[str]) -> Record:
        """The record with the first row's logits of the images that it shares.

        keys: of the record's images, in order
        """
        found = [self._known(key, _of_image(record, span)) for key, span in zip(keys, record.images, strict=True)]
        if all(tokens is None for tokens in found):
            return record
        parts = [
            _of_image(record, span) if tokens is None else tokens
            for tokens, span in zip(found, record.images, strict=True)
        ]
        return replace(record, vision=TopLogits.joined(parts))

    def apply(self, row: CapturedRow) -> CapturedRow:
        """The row with its record unified. A row without a record only counts as one that showed its images."""
        if row.record is not None:
            return replace(row, record=self.unify(row.record, row.image_keys))
        for key in row.image_keys:
            self._leave(key)
        return row

    def _known(self, key: str, own: TopLogits) -> TopLogits | None:
        """The logits that replace an image's own, or None if it keeps its own."""
        first = self._first.get(key)
        if first is None and self._to_come[key] > 1:
            self._first[key] = own
        self._leave(key)
        if first is None:
            return None
        if not _agree(first, own, self.dtype):
            self.n_different += 1
            return None
        self.n_shared += 1
        return first

    def _leave(self, key: str) -> None:
        self._to_come[key] -= 1
        if self._to_come[key] <= 0:
            self._first.pop(key, None)


def _of_image(record: Record, span: ImageSpan) -> TopLogits:
    """The logits of an image's vision tokens."""
    return record.vision.tokens(slice(span.start, span.start + span.count))


def _agree(one: TopLogits, other: TopLogits, dtype: str) -> bool:
    """Whether one teacher in this dtype may have given both for the same tokens.

    Logits are compared rank by rank: rounding may swap ids of nearly equal logits.
    """
    if one.logits.shape != other.logits.shape:
        return False
    mean, other_mean = (np.zeros(0, np.float32) if top.tail_mean is None else top.tail_mean for top in (one, other))
    scale = max(_rms(one.logits), _rms(mean))
    return (
        _within(one.logits, other.logits, "vision_logits", dtype, scale)
        and _within(one.tail_logsumexp, other.tail_logsumexp, "vision_tail_logsumexp", dtype, scale)
        and _within(mean, other_mean, "vision_tail_mean", dtype, scale)
    )


def _rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def _within(a: NDArray[np.float32], b: NDArray[np.float32], quantity: str, dtype: str, scale: float) -> bool:
    if np.array_equal(a, b):  # -inf of an empty tail among them
        return True
    if dtype not in UNIT:
        return False
    allowed = tolerance(quantity, dtype, scale)
    difference = np.abs(a.astype(np.float64) - b)
    return bool(difference.max() <= allowed.largest and difference.mean() <= allowed.mean)
