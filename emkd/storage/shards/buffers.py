"""Memory that is used again: arrays of shards that are not needed any more become those of the next ones.

Fresh memory comes from the system page by page, and each page is cleared before it is ours, which takes time that
reading does not have.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Buffers:
    """Byte arrays that are free. Nobody else may look at an array once it was given back."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """As np.empty: the beginning of the smallest free one that is large enough, or fresh memory."""
        n_bytes = dtype.itemsize * prod(shape)
        # Not more than twice as large: a small array would keep the memory of a large one.
        fitting = [i for i, free in enumerate(self._free) if n_bytes <= free.nbytes <= 2 * n_bytes]
        if fitting:
            memory = self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        else:
            memory = np.empty(n_bytes, np.uint8)
        return memory[:n_bytes].view(dtype).reshape(shape)

    def give_back(self, array: NDArray[Any]) -> None:
        """An array that came from `empty`."""
        memory = array.base
        if memory is None or memory.dtype != np.uint8:
            raise ValueError("give_back: an array that did not come from empty")
        self._free.append(memory)

    def clear(self) -> None:
        """Frees what nobody uses."""
        self._free.clear()
