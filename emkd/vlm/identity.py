"""What makes a model this model: hashes and names that a cache records and a student is checked against."""

import hashlib
import json
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from emkd.errors import GeometryMismatchError, ModelError, TokenizerMismatchError


def weights_sha256(path: Path) -> str:
    """SHA-256 over the names and bytes of the folder's safetensors files, in the order of their names."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no *.safetensors file; pickled weights are not read")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_json(path: Path) -> bytes:
    """The tokenizer as saved, without the padding and truncation of whoever used it last."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{path} has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False).encode()


def image_processor_settings(processor: Any) -> dict[str, Any]:
    """Settings that decide the pixels a model sees, without paths and versions."""
    settings = json.loads(json.dumps(processor.image_processor.to_dict(), default=str, sort_keys=True))
    return {k: v for k, v in settings.items() if k not in ("processor_class", "_processor_class", "device")}


def image_differences(teacher: dict[str, Any], student: dict[str, Any]) -> list[str]:
    """Names of the image processor settings in which a student differs: it may see other pictures."""
    return sorted(name for name in teacher.keys() | student.keys() if teacher.get(name) != student.get(name))


@dataclass(frozen=True)
class FieldOfView:
    """The part of a picture that reaches the model: all of it, or its centre, `height` x `width` of it.

    unit: what these are shares of; "" where all is seen (as it is, squashed, padded or in tiles). "shortest edge": of
        that edge, for both, so that more is lost of a longer picture. "longest edge": it is padded to a square before
        it is cut. "picture": of its own height and width, since it is squashed before. "pixels": it is not resized.
    """

    unit: str = ""
    height: float = 1.0
    width: float = 1.0

    def __str__(self) -> str:
        if not self.unit:
            return "the whole picture"
        if self.unit == "pixels":
            return f"its centre of {self.height:.0f} x {self.width:.0f} pixels"
        return f"its centre, {self.height:.1%} x {self.width:.1%} of the {self.unit}"

    def same_as(self, other: "FieldOfView") -> bool:
        """Up to a hundredth: sizes are whole pixels."""
        near = isclose(self.height, other.height, rel_tol=0.01) and isclose(self.width, other.width, rel_tol=0.01)
        return near and self.unit == other.unit


def field_of_view(settings: dict[str, Any]) -> FieldOfView:
    """What `image_processor_settings` leave of a picture. Whatever does not crop shows all of it."""
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


# ConvNextImageProcessor squashes to sizes from here on, and cuts to smaller ones.
CONVNEXT_SQUASHES_FROM = 384


def _unit(settings: dict[str, Any]) -> str:
    """What a picture that is resized and then cut is cut by. LLaVA pads it to a square first, if asked to (in other
    families `do_pad` fills up batches); LLaVA-NeXT squashes it, and pads its tiles."""
    if settings.get("do_pad") and _is_llava(settings):
        return "longest edge"
    squashes = settings.get("image_grid_pinpoints") or not settings["size"].get("shortest_edge")
    return "picture" if squashes else "shortest edge"


def _is_llava(settings: dict[str, Any]) -> bool:
    return str(settings.get("image_processor_type")).startswith("LlavaImageProcessor")


def check_field_of_view(teacher: dict[str, Any], student: dict[str, Any]) -> None:
    """Raises GeometryMismatchError where `image_processor_settings` of the two show different parts of a picture: the
    teacher's vision tokens would be of things that the student cannot see, or the other way round."""
    theirs, ours = field_of_view(teacher), field_of_view(student)
    if theirs.same_as(ours):
        return
    raise GeometryMismatchError(
        f"teacher and student see different parts of a picture. The teacher sees {theirs} ({_cropping(teacher)}); the "
        f"student sees {ours} ({_cropping(student)}). {_way_out(theirs, student)}"
    )


def _way_out(wanted: FieldOfView, student: dict[str, Any]) -> str:
    settings = as_seen(wanted, student)
    if settings is None:
        kind = student.get("image_processor_type", "The student's image processor")
        return (
            f"{kind} cannot show what the teacher saw: give the student one that can (as CLIPImageProcessor), or make "
            "the cache with a teacher that sees what the student does"
        )
    return (
        "Let the student see what the teacher saw: in its preprocessor_config.json (where it has none, under "
        f"image_processor in its processor_config.json) set {_json(settings)}"
    )


def as_seen(wanted: FieldOfView, student: dict[str, Any]) -> dict[str, Any] | None:
    """What to set in a student's processor, at the size that its model takes, for it to show what is wanted; None
    where a processor of its kind cannot."""
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
    if wanted.unit == "picture":
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


def sha256_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def vocabulary_conflicts(teacher: Tokenizer, student: Tokenizer, limit: int = 5) -> list[str]:
    """Ids that both have and that mean different tokens, the first few, described."""
    common = min(teacher.get_vocab_size(), student.get_vocab_size())
    found = []
    for token in range(common):
        theirs, ours = teacher.id_to_token(token), student.id_to_token(token)
        if theirs != ours:
            found.append(f"id {token}: teacher {theirs!r}, student {ours!r}")
            if len(found) == limit:
                break
    return found


def check_shared_tokenizer(teacher_json: bytes, student_json: bytes) -> None:
    """Raises TokenizerMismatchError unless both read text the same way.

    Ids that one side lacks are no conflict. What a shared id means, the normalizer and the pre-tokenizer have to be
    the same; merges are not compared, since each row's token ids are when it is read.
    """
    conflicts = vocabulary_conflicts(
        Tokenizer.from_buffer(teacher_json),  # type: ignore[arg-type, unused-ignore]
        Tokenizer.from_buffer(student_json),  # type: ignore[arg-type, unused-ignore]
    )
    if conflicts:
        raise TokenizerMismatchError(
            "the student's tokenizer is not the teacher's: ids that both have mean different tokens ("
            + "; ".join(conflicts)
            + "). A cache can be used only by students that share its teacher's tokenizer"
        )
    teacher, student = json.loads(teacher_json), json.loads(student_json)
    for part in ("normalizer", "pre_tokenizer"):
        if teacher.get(part) != student.get(part):
            raise TokenizerMismatchError(
                f"the student's tokenizer has another {part} than the teacher's: the same text would become other "
                f"tokens. Teacher: {json.dumps(teacher.get(part)):.160}; student: {json.dumps(student.get(part)):.160}"
            )


def lacking_ids(teacher_json: bytes, student_json: bytes) -> dict[int, str]:
    """Ids of the teacher's tokenizer that the student's lacks, and their tokens."""
    teacher, student = (
        Tokenizer.from_buffer(data).get_vocab()  # type: ignore[arg-type, unused-ignore]
        for data in (teacher_json, student_json)
    )
    known = set(student.values())
    return {number: token for token, number in sorted(teacher.items(), key=lambda item: item[1]) if number not in known}


def describe_lacking(lacking: dict[int, str]) -> str:
    """For the log."""
    some = ", ".join(f"{token!r} ({number})" for number, token in list(lacking.items())[:4])
    more = ", ..." if len(lacking) > 4 else ""
    return (
        f"the student's tokenizer lacks {len(lacking)} of the teacher's ids: {some}{more}. Rows with one of them in "
        "their text cannot be used; among logits they count as the tail (lacking_mass in the log)"
    )


def licence(path: Path) -> str | None:
    """The licence that the model card names in its front matter, None where there is none."""
    card = path / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines[1:] if lines[:1] == ["---"] else []:
        if line == "---":
            break
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip() or None
    return None
