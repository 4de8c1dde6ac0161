"""Pairs that belong together: shares and pictures, for pairs that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from emkd.demo.pairs import Scene, Shown, shares
from emkd.demo.picture import COLOURS, draw_pairs
from emkd.demo.scenes import draw_scenes
from emkd.storage.record import ImageSpan
from emkd.trainer.matching.match import VisionTokens
from emkd.vlm.head import LMHead
from tests.trainer.naive import cut


@pytest.fixture
def scenes():
    return draw_scenes(np.random.default_rng(0), 3, "train")


def fixed(pairs):
    return SimpleNamespace(pairs=lambda matching: pairs[matching])


def test_shares_count_content_and_place(scenes):
    """Student token 0 lies in cell 0, 4 too; teacher tokens 16 and 17 lie in cell 0, 18 in cell 1."""
    own, theirs = Shown.of(scenes, pads=False, pool=2), Shown.of(scenes, pads=True)
    pairs = {
        "right": (torch.tensor([0, 4]), torch.tensor([16, 17])),
        "half": (torch.tensor([0, 4]), torch.tensor([16, 0])),
        "wrong": (torch.tensor([0, 4]), torch.tensor([0, 1])),
    }
    found = shares([fixed(pairs)] * 3, own, theirs, tuple(pairs))
    assert found["right"] == {"content": 1.0, "place": 1.0}
    assert found["half"] == {"content": 0.5, "place": 0.5}
    assert found["wrong"] == {"content": 0.0, "place": 0.0}


def test_other_cells_of_the_same_content_count_as_content_alone(scenes):
    labels = scenes.labels.copy()
    labels[:, :2] = 7
    alike = type(scenes)(images=scenes.images, labels=labels, order=scenes.order)
    own, theirs = Shown.of(alike, pads=False, pool=2), Shown.of(alike, pads=True)
    found = shares([fixed({"m": (torch.tensor([0]), torch.tensor([18]))})] * 3, own, theirs, ("m",))
    assert found["m"] == {"content": 1.0, "place": 0.0}


def tokens() -> Scene:
    """A student whose 16 tokens have exactly the logits of some of the teacher's 64."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 23, generator=generator) * 3
    chosen = torch.arange(0, 64, 4)
    head = LMHead(weight=torch.eye(23), bias=None, n_tokens=23)
    grid = ImageSpan(start=0, count=16, text_position=0, original_size=(20, 40), grids=((4, 4),))
    vision = VisionTokens(
        hidden=teacher[chosen],
        teacher=cut(teacher, 23),
        images=[grid],
        teacher_images=[ImageSpan(start=0, count=64, text_position=0, original_size=(20, 40), grids=((8, 8),))],
        seed="0",
    )
    return Scene(tokens=vision, head=head, codes=None)


def test_each_matching_is_the_one_that_it_says():
    scene = tokens()
    for cost in ("logits", "log-probabilities", "logits-top-8", "log-probabilities-top-8"):
        own, theirs = scene.pairs(cost)
        assert theirs.tolist() == [4 * i for i in own.tolist()], cost
    own, theirs = scene.pairs("random")
    assert len(own) == 16
    assert theirs.tolist() != [4 * i for i in own.tolist()]
    own, theirs = scene.pairs("pooled")
    assert len(own) == 64


def test_the_picture_has_a_line_of_the_right_colour_for_each_pair(scenes):
    own, theirs = Shown.of(scenes[:1], pads=False, pool=2), Shown.of(scenes[:1], pads=True)
    image = Image.fromarray(scenes.images[0])

    def colours(j: int) -> set:
        scene = fixed({"m": (torch.tensor([0]), torch.tensor([j]))})
        drawn = np.asarray(draw_pairs(image, False, scene, "m", own, theirs))
        between = drawn[:, 440:560].reshape(-1, 3)
        return {name for name, colour in COLOURS.items() if (between[: 420 * 120] == colour).all(axis=1).any()}

    assert colours(16) == {"content and place"}
    assert colours(0) == {"nothing"}
