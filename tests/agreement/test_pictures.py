"""Which part of an image a processor shows: the rule from its settings, compared with the pixels it makes."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from emkd.agreement.pictures import FieldOfView, as_seen, check_field_of_view, field_of_view
from emkd.errors import GeometryMismatchError
from emkd.vlm.identity import image_processor_settings
from tests import tiny

SQUARE = {"height": 224, "width": 224}
WHOLE = FieldOfView()
PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 100,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def made(kind: str, **settings):
    """A processor of transformers that leaves colours as they are."""
    return getattr(transformers, kind)(do_normalize=False, **settings)


def settings_of(image_processor) -> dict:
    processor = tiny.new_processor()
    processor.image_processor = image_processor
    return image_processor_settings(processor)


CASES = {
    "CLIP": (("CLIPImageProcessor", {}), FieldOfView("shortest edge", 1.0, 1.0)),
    "CLIP, PIL": (("CLIPImageProcessorPil", {}), FieldOfView("shortest edge", 1.0, 1.0)),
    "CLIP that cuts more": (
        ("CLIPImageProcessor", {"size": {"shortest_edge": 256}}),
        FieldOfView("shortest edge", 0.875, 0.875),
    ),
    "CLIP that squashes": (("CLIPImageProcessor", {"size": SQUARE}), WHOLE),
    "CLIP without crop": (("CLIPImageProcessor", {"size": SQUARE, "do_center_crop": False}), WHOLE),
    "CLIP that squashes and cuts": (
        ("CLIPImageProcessor", {"size": {"height": 256, "width": 256}}),
        FieldOfView("image", 0.875, 0.875),
    ),
    "CLIP that only cuts": (("CLIPImageProcessor", {"do_resize": False}), FieldOfView("pixels", 224, 224)),
    "LLaVA": (("LlavaImageProcessor", {}), FieldOfView("shortest edge", 1.0, 1.0)),
    "LLaVA that pads": (("LlavaImageProcessor", {"do_pad": True}), WHOLE),
    "LLaVA that pads, PIL": (("LlavaImageProcessorPil", {"do_pad": True}), WHOLE),
    "LLaVA that pads and cuts": (
        ("LlavaImageProcessor", {"do_pad": True, "size": {"shortest_edge": 256}}),
        FieldOfView("longest edge", 0.875, 0.875),
    ),
    "SigLIP": (("SiglipImageProcessor", {}), WHOLE),
    "SigLIP, PIL": (("SiglipImageProcessorPil", {}), WHOLE),
    "LLaVA-NeXT": (("LlavaNextImageProcessor", {}), WHOLE),
    "LLaVA-NeXT, PIL": (("LlavaNextImageProcessorPil", {}), WHOLE),
    "LLaVA-NeXT that cuts": (
        ("LlavaNextImageProcessor", {"size": {"shortest_edge": 256}}),
        FieldOfView("image", 0.875, 0.875),
    ),
    "LLaVA-OneVision": (("LlavaOnevisionImageProcessor", {}), WHOLE),
    "Qwen2-VL": (("Qwen2VLImageProcessor", {}), WHOLE),
    "Qwen2-VL, PIL": (("Qwen2VLImageProcessorPil", {}), WHOLE),
    "Idefics3": (("Idefics3ImageProcessor", {}), WHOLE),
    "Gemma 3": (("Gemma3ImageProcessor", {}), WHOLE),
    "Gemma 3, pan and scan": (("Gemma3ImageProcessor", PAN_AND_SCAN), WHOLE),
    "ConvNeXt": (
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
        FieldOfView("shortest edge", 0.875, 0.875),
    ),
    "ConvNeXt that squashes": (("ConvNextImageProcessor", {}), WHOLE),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rule_by_settings(name):
    (kind, options), expected = CASES[name]
    assert field_of_view(settings_of(made(kind, **options))) == expected


def marked(height: int, width: int) -> Image.Image:
    """Grey, with the outermost 6% on the left red, on the right green, on top blue and below white."""
    pixels = np.full((height, width, 3), 90, dtype=np.uint8)
    across, down = round(0.06 * width), round(0.06 * height)
    pixels[:down], pixels[-down:] = (0, 0, 255), (255, 255, 255)
    pixels[:, :across], pixels[:, -across:] = (255, 0, 0), (0, 255, 0)
    return Image.fromarray(pixels)


def borders_seen(image_processor, picture: Image.Image) -> set[str]:
    """Which marks are in the first tile (LLaVA-NeXT: the overview; the other processors here have one tile)."""
    pixels = image_processor(images=picture, return_tensors="pt")["pixel_values"].float()
    first = pixels.reshape(-1, 3, *pixels.shape[-2:])[0].clamp(0, 1)
    red, green, blue = (channel.flatten() for channel in first)
    high, low = 0.75, 0.25
    found = {
        "left": (red > high) & (green < low) & (blue < low),
        "right": (green > high) & (red < low) & (blue < low),
        "top": (blue > high) & (red < low) & (green < low),
        "bottom": torch.stack([red, green, blue]).min(0).values > high,
    }
    return {name for name, there in found.items() if bool(there.any())}


def expected_borders(view: FieldOfView, height: int, width: int) -> set[str]:
    """Naive: a mark is seen if it is inside the visible part of the image."""
    edge = min(height, width)
    seen_down, seen_across = {
        "": (height, width),
        "shortest edge": (view.height * edge, view.width * edge),
        "longest edge": (view.height * max(height, width), view.width * max(height, width)),
        "image": (view.height * height, view.width * width),
        "pixels": (view.height, view.width),
    }[view.unit]
    down = {"top", "bottom"} if seen_down / height > 0.88 else set()
    return down | ({"left", "right"} if seen_across / width > 0.88 else set())


SEEN = [name for name in CASES if not name.startswith(("Qwen", "Idefics"))]


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("shape", [(300, 600), (600, 300), (320, 320)])
def test_the_rule_by_pixels(name, shape):
    """Marks at the borders of wide, high and square pictures go through the real processors."""
    (kind, options), view = CASES[name]
    assert borders_seen(made(kind, **options), marked(*shape)) == expected_borders(view, *shape)


@pytest.mark.parametrize(("teacher", "student"), [("SigLIP", "CLIP"), ("LLaVA that pads", "LLaVA"), ("CLIP", "LLaVA-NeXT"), ("CLIP", "CLIP that cuts more"), ("CLIP", "CLIP, squashed"), ("CLIP that only cuts", "CLIP")])  # fmt: skip
def test_different_parts_are_refused_with_what_to_change(teacher, student):
    (kind, options), _ = CASES[teacher]
    theirs = settings_of(made(kind, **options))
    (kind, options), _ = CASES.get(student, CASES["CLIP that squashes"])
    ours = settings_of(made(kind, **options))
    with pytest.raises(GeometryMismatchError, match="The teacher sees .*size.*the student sees .*size"):
        check_field_of_view(theirs, ours)


@pytest.mark.parametrize(("teacher", "student"), [("SigLIP", "LLaVA that pads"), ("Qwen2-VL", "CLIP that squashes"), ("LLaVA-NeXT", "LLaVA-OneVision"), ("CLIP", "LLaVA"), ("CLIP that cuts more", "ConvNeXt"), ("Gemma 3", "Idefics3")])  # fmt: skip
def test_the_same_part_is_no_obstacle(teacher, student):
    theirs, ours = (settings_of(made(CASES[name][0][0], **CASES[name][0][1])) for name in (teacher, student))
    check_field_of_view(theirs, ours)
    check_field_of_view(ours, theirs)


@pytest.mark.parametrize("student", CASES)
@pytest.mark.parametrize("teacher", CASES)
def test_what_the_message_says_mends_it(teacher, student):
    """A processor made with the proposed settings shows what the teacher's processor shows, by the rule and by
    pixels."""
    wanted = CASES[teacher][1]
    kind, options = CASES[student][0]
    before = settings_of(made(kind, **options))
    if field_of_view(before).same_as(wanted):
        return
    proposed = as_seen(wanted, before)
    if proposed is None:
        assert wanted.unit or kind == "ConvNextImageProcessor", "the others can show all of a picture"
        with pytest.raises(GeometryMismatchError, match="cannot show what the teacher saw: give the student one that"):
            check_field_of_view(settings_of(made(CASES[teacher][0][0], **CASES[teacher][0][1])), before)
        return
    mended = made(kind, **{**options, **proposed})
    assert field_of_view(settings_of(mended)).same_as(wanted)
    if not kind.startswith(("Qwen", "Idefics")):  # not one picture
        assert borders_seen(mended, marked(300, 600)) == expected_borders(wanted, 300, 600)
