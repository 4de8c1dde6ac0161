"""How an image's vision tokens lie in two dimensions, by family.

An empty tuple means that this module does not know the layout of the family: then an image has a count of tokens and
no grid.
"""

from typing import Any

import torch


def tile_grids(processor: Any, inputs: dict[str, torch.Tensor], image: int, count: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of each tile of the given image, in token order.

    inputs: the processor's tensors for one sample;  count: the image's vision tokens
    """
    if type(processor).__name__ == "LlavaProcessor":
        return _llava_grid(processor, inputs, image, count)
    return ()


def _llava_grid(processor: Any, inputs: dict[str, torch.Tensor], image: int, count: int) -> tuple[tuple[int, int], ...]:
    """One tile, row by row. `processor.patch_size` is the side of one *token* in pixels: it grows with pooling."""
    height, width = inputs["pixel_values"][image].shape[-2:]
    rows, columns = int(height // processor.patch_size), int(width // processor.patch_size)
    return ((rows, columns),) if rows * columns == count else ()
