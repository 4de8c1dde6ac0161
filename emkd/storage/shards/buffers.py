"""Reuse the memory of shards that are no longer needed for the next shards.

The system hands out new memory page by page and clears each page first, which would take a notable part of the time of
reading a shard.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Buffers:
    """Free byte arrays. Do not use an array after giving it back."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """As np.empty, in the smallest free array that is large enough, or in new memory."""
        n_bytes = dtype.itemsize * prod(shape)
        # At most twice as large: otherwise a small array would keep the memory of a large one.
        fitting = [i for i, free in enumerate(self._free) if n_bytes <= free.nbytes <= 2 * n_bytes]
        if fitting:
            memory = self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        else:
            memory = np.empty(n_bytes, np.uint8)
        return memory[:n_bytes].view(dtype).reshape(shape)

    def give_back(self, array: NDArray[Any]) -> None:
        """Give back an array from `empty`. Raises ValueError if it did not come from `empty`."""
        memory = array.base
        if memory is None or memory.dtype != np.uint8:
            raise ValueError("give_back: the array did not come from empty")
        self._free.append(memory)

    def clear(self) -> None:
        """Release all free arrays to the system."""
        self._free.clear()
