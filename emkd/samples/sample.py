"""A sample: one conversation with its images, independent of its file format.

    row of a file --ParsedRow--> turns, images --sample_key--> Sample

Identical content gives identical samples, from Parquet and from LLaVA-style JSON. `encode.py` turns a
Sample into token ids.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from emkd.errors import SampleError

# LLaVA's data mark an image by this word, with a newline between it and the text. The newline belongs to the
# mark: the chat template writes its own separator.
IMAGE_MARK = re.compile(r"\n?<image>\n?")

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class ImagePart:
    """Marks the sample's next image in a turn."""


Part = str | ImagePart


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message: `role` is user, assistant or system; `parts` are texts and images in order."""

    role: str
    parts: tuple[Part, ...]

    def as_message(self) -> dict[str, Any]:
        """The message in the form that chat templates of transformers expect."""
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in self.parts]
        return {"role": self.role, "content": content}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row that can be used: its conversation and its images.

    row:    0-based over all files of the dataset
    id:     the row's own id, "" if it has none
    key:    see `sample_key`
    images: encoded bytes (PNG, JPEG, ...), in the order of the turns' image parts
    """

    row: int
    id: str
    key: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]


def parse_turns(messages: Sequence[dict[str, Any]]) -> tuple[Turn, ...]:
    """Parse messages with role and content, or LLaVA's with from and value. Raises SampleError."""
    if not messages:
        raise SampleError("no-messages", "the conversation is empty")
    if not isinstance(messages, list):
        raise SampleError("bad-content", f"the conversation is a {type(messages).__name__}, expected a list of turns")
    return tuple(_parse_turn(number, message) for number, message in enumerate(messages))


def _parse_turn(number: int, message: Any) -> Turn:
    if not isinstance(message, dict):
        raise SampleError("bad-content", f"turn {number} is a {type(message).__name__}, expected role and content")
    said_by = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    role = ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise SampleError("bad-role", f"turn {number} has role {said_by!r}; expected one of {sorted(ROLES)}")
    if isinstance(content, str):
        parts = _split_text(_checked(content, number))
    elif isinstance(content, list):
        parts = tuple(_parse_part(number, part) for part in content)
    else:
        raise SampleError("bad-content", f"turn {number} has content of type {type(content).__name__}")
    _check_answer(number, role, parts)
    return Turn(role=role, parts=parts)


def _check_answer(number: int, role: str, parts: Sequence[Part]) -> None:
    """Raise SampleError for an image in an answer: a student would learn to say the tokens around the image."""
    if role == "assistant" and any(isinstance(part, ImagePart) for part in parts):
        raise SampleError("image-in-answer", f"turn {number} is the assistant's and has an image")


def _checked(text: str, number: int) -> str:
    """Return the text. Raises SampleError for a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad-content", f"turn {number} has a text that is not valid Unicode: {error}") from error
    return text


def _split_text(text: str) -> tuple[Part, ...]:
    texts = IMAGE_MARK.split(text)
    parts: list[Part] = [texts[0]]
    for following in texts[1:]:
        parts += [ImagePart(), following]
    return tuple(part for part in parts if part != "")


def _parse_part(number: int, part: Any) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return ImagePart()
    if kind == "text" and isinstance(part.get("text"), str):
        return _checked(part["text"], number)
    raise SampleError("bad-content", f"turn {number} has a part that is neither text nor image: {part!r:.200}")


def check_image_count(turns: Sequence[Turn], n_images: int) -> None:
    """Raise SampleError unless the turns mark each image: guessing would show the model another prompt."""
    n_marked = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    if n_marked != n_images:
        raise SampleError(
            "image-count",
            f"the messages mark {n_marked} images (by <image> or a part of type image) and the row has {n_images}",
        )


def sample_key(turns: Sequence[Turn], images: Sequence[bytes]) -> str:
    """SHA-256 of length-prefixed roles, texts and encoded image bytes, in order.

    The prefixes distinguish ("ab", "c") from ("a", "bc"). Each image is hashed at its position in the turns.
    """
    return _hashed(b"emkd-sample-1", turns, images)


def text_sha256(turns: Sequence[Turn]) -> str:
    """The hash of roles, texts and image positions, without the images. Rows of equal keys have equal text hashes."""
    return _hashed(b"emkd-text-1", turns, repeat(b""))


def _hashed(kind: bytes, turns: Sequence[Turn], images: Iterable[bytes]) -> str:
    digest = hashlib.sha256(kind)
    remaining = iter(images)
    for turn in turns:
        _feed(digest, b"R", turn.role.encode())
        for part in turn.parts:
            if isinstance(part, str):
                _feed(digest, b"T", part.encode())
            else:
                _feed(digest, b"I", next(remaining))
    return digest.hexdigest()


def _feed(digest: Any, kind: bytes, data: bytes) -> None:
    digest.update(kind + len(data).to_bytes(8, "little"))
    digest.update(data)
