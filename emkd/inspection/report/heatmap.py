"""The numbers of a heat map: which rows, which columns, which shade. Pure functions of arrays.

Shape legend: L text tokens, n vision tokens of one image, A answer tokens. `affinity` is [L, n], cosines.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_ROWS = 40
MAX_COLUMNS = 64

Grids = Sequence[tuple[int, int]]


def bin_columns(
    values: ArrayLike, counts: ArrayLike, max_columns: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Average neighbouring columns: [rows, n] -> ([rows, m], counts [m]) with m <= max_columns.

    Each new column is the mean of equally many old ones; the last takes what is left, which may be fewer.

    counts: [n] tokens that each column stands for already, so that binning twice is still a mean of tokens
    """
    table, weights = np.asarray(values, np.float64), np.asarray(counts, np.int64)
    each = columns_each(len(weights), max_columns)
    if each <= 1:
        return table, weights
    starts = np.arange(0, len(weights), each)
    sums = np.add.reduceat(weights, starts)
    return np.add.reduceat(table * weights, starts, axis=1) / sums, sums


def columns_each(n: int, max_columns: int) -> int:
    """Return how many neighbouring columns of n become one, so that at most `max_columns` are left."""
    return -(-n // max_columns)


def spread(n: int, chosen: int) -> list[int]:
    """Return `chosen` of the numbers 0 to n - 1, ascending, evenly spread; all of them if n is not larger."""
    chosen = min(n, chosen)
    return [(2 * i + 1) * n // (2 * chosen) for i in range(chosen)]


def choose_rows(n_rows: int, answers: Sequence[int], limit: int = MAX_ROWS) -> list[int]:
    """Return the rows to show, ascending, at most `limit`: the answers' rows and others between them.

    If the answers alone exceed `limit`, they get three quarters of it, so that the question is visible too.
    """
    if n_rows <= limit:
        return list(range(n_rows))
    theirs = sorted(set(answers))
    others = sorted(set(range(n_rows)) - set(theirs))
    n_answers = len(theirs) if len(theirs) <= limit else max(limit * 3 // 4, limit - len(others))
    shown = [theirs[i] for i in spread(len(theirs), n_answers)]
    return sorted(shown + [others[i] for i in spread(len(others), limit - n_answers)])


def split_tiles(n: int, grids: Grids) -> list[tuple[slice, tuple[int, int]]]:
    """Return each tile's vision tokens and its (rows, columns); empty if the grids do not add up to n tokens."""
    ends = np.cumsum([0, *(rows * columns for rows, columns in grids)]).tolist()
    if ends[-1] != n:
        return []
    return [(slice(start, stop), grid) for (start, stop), grid in zip(pairwise(ends), grids, strict=True)]


def answer_grids(
    affinity: NDArray[np.float32], answers: Sequence[int], grids: Grids, max_columns: int = MAX_COLUMNS
) -> list[NDArray[np.float64]]:
    """Return the mean affinity of the answer tokens to each vision token, as rows x columns of each tile.

    affinity: [L, n] of the text tokens and the image's vision tokens;  answers: which of the L are answers

    Columns are binned to `max_columns`. Empty without answer tokens, and if the tiles' grids are not known.
    """
    if not len(answers):
        return []
    means = affinity[list(answers)].mean(axis=0, dtype=np.float64)
    tiles = split_tiles(len(means), grids)
    return [bin_columns(means[at].reshape(grid), np.ones(grid[1]), max_columns)[0] for at, grid in tiles]


def bounds(arrays: Sequence[ArrayLike]) -> tuple[float, float]:
    """Return the smallest and the largest number in all arrays, (0, 0) if they are empty."""
    flat = [np.ravel(np.asarray(array, np.float64)) for array in arrays]
    values = np.concatenate([*flat, np.zeros(0)])
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)


def levels(values: ArrayLike, low: float, high: float, n_levels: int) -> NDArray[np.int64]:
    """Return which of `n_levels` equal steps from low to high each value is in, from 0; all 0 if low is high."""
    table = np.asarray(values, np.float64)
    if high <= low:
        return np.zeros(table.shape, np.int64)
    steps = np.floor((table - low) / (high - low) * n_levels)
    return np.clip(steps, 0, n_levels - 1).astype(np.int64)
