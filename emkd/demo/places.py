"""What each vision token of a scene shows: the cell that it lies in, and that cell's content.

Both models see 40 x 40 pixels in 8 x 8 patches. A teacher pads: the scene is in the middle four rows, and a cell has
2 x 2 tokens. A student stretches, and its pooled tokens are 4 x 4: a cell has one column and two rows of them.

Shape legend: n scenes, t vision tokens of a model, row by row
"""

import numpy as np
from numpy.typing import NDArray

from emkd.demo.models import PATCHES_PER_SIDE
from emkd.demo.scenes import COLUMNS, EMPTY, HEIGHT, ROWS, WIDTH

PADDING = EMPTY + 1  # the content of a token that shows nothing of the scene
NOWHERE = -1  # its cell


def places(*, pads: bool, pool: int = 1) -> NDArray[np.int64]:
    """Return the cell [t] that each vision token lies in, NOWHERE for padding.

    pads: whether the processor pads, or stretches;  pool: windows of pool x pool patches make a token
    """
    side = PATCHES_PER_SIDE // pool
    middles = (np.arange(side) + 0.5) / side  # of tokens, as shares of the square
    column = np.floor(middles * COLUMNS).astype(np.int64)
    margin = (1 - HEIGHT / WIDTH) / 2 if pads else 0.0
    row = np.floor((middles - margin) / (1 - 2 * margin) * ROWS).astype(np.int64)
    inside = (row >= 0) & (row < ROWS)
    return np.where(inside[:, None], COLUMNS * row[:, None] + column, NOWHERE).ravel()


def contents(labels: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what each token shows, [n, t]: 0-9 a digit, 10 empty, 11 padding. labels: [n, 8];  cells: `places` [t]"""
    return np.where(cells == NOWHERE, PADDING, labels[:, cells])
