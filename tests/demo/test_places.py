"""Which cell each vision token lies in, and what it shows, against pixels that the processors make."""

import numpy as np
import pytest
import torch

from emkd.demo.models import new_processor
from emkd.demo.places import NOWHERE, PADDING, contents, places
from emkd.demo.scenes import Scenes, file_scenes


def marked(cell: int) -> np.ndarray:
    """A scene whose only white cell is this one."""
    image = np.zeros((20, 40, 3), np.uint8)
    row, column = divmod(cell, 4)
    image[10 * row : 10 * row + 10, 10 * column : 10 * column + 10] = 255
    return image


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("cell", range(8))
def test_a_cell_s_tokens_are_those_that_see_it(pads, pool, cell):
    """The white patches of what the processor makes of a scene with one white cell."""
    pixels = new_processor(pads=pads).image_processor(images=[marked(cell)], return_tensors="pt")["pixel_values"]
    seen = torch.nn.functional.avg_pool2d(pixels[:, :1], 5 * pool).flatten() > 0.5
    assert np.array_equal(places(pads=pads, pool=pool) == cell, seen.numpy())


def test_padding_is_nowhere_and_a_stretched_scene_has_none():
    assert (places(pads=True) == NOWHERE).sum() == 32
    assert (places(pads=False, pool=2) == NOWHERE).sum() == 0


def test_contents_are_the_labels_of_the_cells():
    scenes = file_scenes(3, "train", seed=0)
    cells = places(pads=True)
    shown = contents(scenes.labels, cells)
    assert shown.shape == (3, 64)
    for scene in range(3):
        for token, cell in enumerate(cells):
            assert shown[scene, token] == (PADDING if cell == NOWHERE else scenes.labels[scene, cell])
    assert isinstance(scenes, Scenes)
