"""Which part of an image an image processor shows its model, and whether teacher and student see the same part."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

from emkd.errors import GeometryMismatchError
from emkd.storage.record import ImageSpan


def image_differences(teacher: dict[str, Any], student: dict[str, Any]) -> list[str]:
    """Return the names of the image processor settings in which the two differ: they may see different images."""
    return sorted(name for name in teacher.keys() | student.keys() if teacher.get(name) != student.get(name))


@dataclass(frozen=True)
class FieldOfView:
    """The part of an image that reaches the model: the whole image, or a centre of `height` x `width`.

    unit: what height and width are shares of.
        "": the model sees the whole image, as it is, squashed, padded or in tiles
        "shortest edge": both are shares of that edge, so a longer image loses more
        "longest edge": the image is padded to a square before it is cropped
        "image": shares of its own height and width, since it is squashed before it is cropped
        "pixels": height and width are in pixels, since the image is not resized
    """

    unit: str = ""
    height: float = 1.0
    width: float = 1.0

    def __str__(self) -> str:
        if not self.unit:
            return "the whole image"
        if self.unit == "pixels":
            return f"its centre of {self.height:.0f} x {self.width:.0f} pixels"
        return f"its centre, {self.height:.1%} x {self.width:.1%} of the {self.unit}"

    def same_as(self, other: "FieldOfView") -> bool:
        """Return whether the two are equal within 1%: sizes are whole pixels."""
        near = isclose(self.height, other.height, rel_tol=0.01) and isclose(self.width, other.width, rel_tol=0.01)
        return near and self.unit == other.unit


def field_of_view(settings: dict[str, Any]) -> FieldOfView:
    """Return what image processor settings (`emkd.vlm.identity.image_processor_settings`) leave of an image.

    A processor that does not crop shows the whole image.
    """
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    height, width = crop.get("height"), crop.get("width")
    edge = size.get("shortest_edge")
    if edge and settings.get("crop_pct") and edge < CONVNEXT_SQUASHES_FROM:
        return FieldOfView("shortest edge", settings["crop_pct"], settings["crop_pct"])
    if not settings.get("do_center_crop") or not (height and width):
        return FieldOfView()
    resized = (edge or size.get("height"), edge or size.get("width"))
    if not settings.get("do_resize") or not all(resized):
        return FieldOfView("pixels", height, width)
    shares = (height / resized[0], width / resized[1])
    unit = _unit(settings)
    return FieldOfView() if unit != "shortest edge" and min(shares) >= 1 else FieldOfView(unit, *shares)


# ConvNextImageProcessor squashes images to this size and larger ones, and crops to smaller ones.
CONVNEXT_SQUASHES_FROM = 384


def _unit(settings: dict[str, Any]) -> str:
    """The unit of the field of view of an image that is resized and then cropped.

    LLaVA pads it to a square first if `do_pad` is set (in other families `do_pad` pads batches); LLaVA-NeXT squashes
    it, and pads its tiles.
    """
    if settings.get("do_pad") and _is_llava(settings):
        return "longest edge"
    squashes = settings.get("image_grid_pinpoints") or not settings["size"].get("shortest_edge")
    return "image" if squashes else "shortest edge"


def _is_llava(settings: dict[str, Any]) -> bool:
    return str(settings.get("image_processor_type")).startswith("LlavaImageProcessor")


def check_field_of_view(teacher: dict[str, Any], student: dict[str, Any]) -> None:
    """Check that the image processor settings of both show the same part of an image. Raises GeometryMismatchError.

    Otherwise the teacher's vision tokens would describe things that the student cannot see, or vice versa.
    """
    theirs, ours = field_of_view(teacher), field_of_view(student)
    if theirs.same_as(ours):
        return
    raise GeometryMismatchError(
        f"teacher and student see different parts of an image. The teacher sees {theirs} ({_cropping(teacher)}); the "
        f"student sees {ours} ({_cropping(student)}). {_way_out(theirs, student)}"
    )


def _way_out(wanted: FieldOfView, student: dict[str, Any]) -> str:
    settings = as_seen(wanted, student)
    if settings is None:
        kind = student.get("image_processor_type", "The student's image processor")
        return (
            f"{kind} cannot show what the teacher saw: give the student one that can (such as CLIPImageProcessor), or "
            "make the cache with a teacher that sees what the student sees"
        )
    return (
        "To let the student see what the teacher saw, set in its preprocessor_config.json (if it has none, under "
        f"image_processor in its processor_config.json): {_json(settings)}"
    )


def as_seen(wanted: FieldOfView, student: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings that let a student's processor show `wanted`, at the size that its model takes.

    None if a processor of its kind cannot.
    """
    if student.get("crop_pct"):
        return None
    size, crop = student.get("size") or {}, student.get("crop_size") or {}
    taken = crop if crop.get("height") else size
    edge = taken.get("shortest_edge") or 0
    height, width = int(taken.get("height") or edge), int(taken.get("width") or edge)
    if not wanted.unit:
        return {"do_center_crop": False, "size": {"height": height, "width": width}}
    pads = wanted.unit == "longest edge"
    cannot_cut = student.get("do_center_crop") is None or student.get("image_grid_pinpoints")
    if cannot_cut or (pads and not _is_llava(student)):
        return None
    found: dict[str, Any] = {"do_center_crop": True, "do_resize": wanted.unit != "pixels"}
    if bool(student.get("do_pad")) != pads:
        found["do_pad"] = pads
    if wanted.unit == "pixels":
        return {**found, "crop_size": {"height": int(wanted.height), "width": int(wanted.width)}}
    found["crop_size"] = {"height": height, "width": width}
    if wanted.unit == "image":
        whole = {"height": round(height / wanted.height), "width": round(width / wanted.width)}
        return {**found, "size": whole}
    return {**found, "size": {"shortest_edge": round(height / wanted.height)}}


def _cropping(settings: dict[str, Any]) -> str:
    names = ("do_resize", "size", "do_center_crop", "crop_size", "crop_pct", "do_pad")
    return f"{settings.get('image_processor_type', 'settings')}: " + _json(
        {name: settings[name] for name in names if settings.get(name) is not None}
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def check_same_spans(reader: Sequence[ImageSpan], teacher: Sequence[ImageSpan], row: int, *, name: str) -> None:
    """Check that the images of a row became the same vision tokens for both. Raises GeometryMismatchError."""
    spans = [[(span.text_position, span.start, span.count) for span in images] for images in (reader, teacher)]
    if spans[0] != spans[1]:
        own, theirs = (", ".join(f"{count} at text token {at}" for at, _, count in span) for span in spans)
        raise GeometryMismatchError(
            f"row {row}: the vision tokens of its images are {own} for the {name}, and {theirs} for the teacher: the "
            "image processor or the model's image size differs"
        )
