"""Memory that is used again: chunks of shards that are not needed any more become those of the next ones.

Fresh memory comes from the system page by page, and each page is cleared before it is ours, which takes time that
reading does not have.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Buffers:
    """Byte arrays by their size. Nobody else may look at an array once it was given back."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """As np.empty."""
        n_bytes = dtype.itemsize * int(np.prod(shape))
        free = self._free.get(n_bytes)
        flat = free.pop() if free else np.empty(n_bytes, np.uint8)
        return flat.view(dtype).reshape(shape)

    def give_back(self, arrays: Iterable[NDArray[Any]]) -> None:
        """Arrays that came from `empty`."""
        for array in arrays:
            self._free[array.nbytes].append(array.reshape(-1).view(np.uint8))

    def clear(self) -> None:
        """Frees what nobody uses."""
        self._free.clear()
