"""How an image's vision tokens lie in two dimensions.

An empty tuple means that this module does not know the family's layout: such an image has a count of tokens and no
grid. Families are distinguished by the class of their processor, because this package is below `emkd.vlm`, which has
the table of families.
"""

from typing import Any

import torch


def tile_grids(processor: Any, inputs: dict[str, torch.Tensor], image: int, count: int) -> tuple[tuple[int, int], ...]:
    """Return (rows, columns) of each tile of an image, in token order.

    inputs: the processor's tensors for one sample;  image: its index in them;  count: its vision tokens
    """
    if type(processor).__name__ == "LlavaProcessor":
        return _llava_grid(processor, inputs, image, count)
    return ()


def _llava_grid(processor: Any, inputs: dict[str, torch.Tensor], image: int, count: int) -> tuple[tuple[int, int], ...]:
    """One tile, row by row. `processor.patch_size` is the pixels along one *token*: it grows with pooling."""
    height, width = inputs["pixel_values"][image].shape[-2:]
    rows, columns = int(height // processor.patch_size), int(width // processor.patch_size)
    return ((rows, columns),) if rows * columns == count else ()
