"""A sample: one conversation with its images, independent of its file format.

    row of a file --ParsedRow--> turns, images --sample_key--> Sample

Identical content gives identical samples, from every format. `encode.py` turns a Sample into token ids.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any


@dataclass(frozen=True)
class ImagePart:
    """Marks the sample's next image in a turn."""


Part = str | ImagePart


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message.

    role:   user, assistant or system
    parts:  texts and images in order
    learnt: False for an assistant's turn that is context and no answer (`loss: false` in the row)
    """

    role: str
    parts: tuple[Part, ...]
    learnt: bool = True

    @property
    def is_answer(self) -> bool:
        """Whether the student learns what this turn says."""
        return self.role == "assistant" and self.learnt

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
        if not turn.learnt:
            _feed(digest, b"N", b"")
        for part in turn.parts:
            if isinstance(part, str):
                _feed(digest, b"T", part.encode())
            else:
                _feed(digest, b"I", next(remaining))
    return digest.hexdigest()


def _feed(digest: Any, kind: bytes, data: bytes) -> None:
    digest.update(kind + len(data).to_bytes(8, "little"))
    digest.update(data)
