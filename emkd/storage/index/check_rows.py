"""The rows of a shard's index fit together: every count, offset and image that a reader follows.

Their hash says that they are as they were written, not that a well-meaning program wrote them; a reader would end in an
IndexError, or read the numbers of another sample.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError
from emkd.storage.arrays.layout import AXES
from emkd.storage.index.table import MAY_BE_NULL, OK, SKIPPED, count_column, offset_column, with_all_columns
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.sizes import LARGEST


def check_rows(where: str, table: pa.Table, shard: int, manifest: Manifest) -> None:
    """Check the rows of a shard. where: of its index, for messages. Raises DamagedCacheError."""
    try:
        nulls = [name for name in table.column_names if name not in MAY_BE_NULL and table[name].null_count]
        _expect(not nulls, f"{nulls} have nulls")
        _check(with_all_columns(table), shard, manifest)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise DamagedCacheError(f"{where}: its rows contradict each other ({error}). {NEXT_STEP}") from error


def _check(table: pa.Table, shard: int, manifest: Manifest) -> None:
    statuses = table["status"].to_pylist()
    _expect(set(statuses) <= {OK, SKIPPED}, "a status is neither ok nor skipped")
    _expect(set(table["shard"].to_pylist()) <= {shard}, f"a row is not of shard {shard}")
    counts = {axis: _numbers(table, count_column(axis)) for axis in AXES}
    samples = np.array(statuses, object) == OK
    for axis in AXES:
        _expect(not counts[axis][~samples].any(), f"a skipped row has {axis} tokens")
    pairs = counts["text"] * counts["vision"] if manifest.stores_affinity else np.zeros(len(table), np.int64)
    _expect(np.array_equal(counts["affinity"], pairs * samples), "affinity_count is not that of all pairs of tokens")
    _expect(bool((counts["answer"] <= counts["text"]).all()), "more answer tokens than text tokens")
    for axis in ("text", "affinity", "answer"):
        ends = _numbers(table, offset_column(axis)) + counts[axis]
        _expect(bool((ends <= counts[axis].sum()).all()), f"{axis} tokens of a sample are beyond the shard's")
    keys = table["key"].to_pylist()
    for row, images in enumerate(table["images"].to_pylist()):
        _expect(bool(keys[row]) or not samples[row], "a sample has no key")
        _check_images(images, int(counts["text"][row]), int(counts["vision"][row]))


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """Return a column of counts or offsets, small enough that sums and products of two fit."""
    found = np.array(table[name].to_pylist(), np.int64)
    _expect(not len(found) or 0 <= int(found.min()) <= int(found.max()) < 2**31, f"{name} is negative, or too large")
    return found


def _check_images(images: list[dict[str, Any]], n_text: int, n_vision: int) -> None:
    start = 0
    for image in images:
        _expect(None not in image.values(), "an image has nulls")
        _expect(image["start"] == start and image["count"] >= 0, "the images of a sample do not follow each other")
        _expect(0 <= image["text_position"] <= n_text, "an image is beyond its text")
        _expect(0 <= image["offset"] <= LARGEST, "the vision tokens of an image are before the shard's")
        _expect(image["height"] >= 0 and image["width"] >= 0, "an image has a negative size")
        grids = image["grids"]
        whole = all(grid is not None and len(grid) == 2 and None not in grid and min(grid) >= 0 for grid in grids)
        _expect(whole, "a grid is not rows and columns")
        start += image["count"]
    _expect(start == n_vision, f"{start} vision tokens of images, {n_vision} of the sample")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
