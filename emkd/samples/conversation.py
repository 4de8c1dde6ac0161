"""The conversation of a row: its turns, and which picture goes where.

    [{role, content}, ...] or [{from, value}, ...] --parse_conversation--> Conversation

A content is a text in which `<image>` marks pictures, or a list of parts. What a turn or a part has beyond what
`known.py` lists is never dropped unseen.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emkd.errors import SampleError
from emkd.samples.known import (
    AUDIO,
    CONTENT_KEYS,
    CONTRADICTORY,
    IMAGE,
    LEARNT_KEYS,
    OWN_IMAGE_KEYS,
    PART,
    ROLE_KEYS,
    TURN,
    UNREAD,
    VIDEO,
    check_known,
    is_empty,
    name_kind,
)
from emkd.samples.sample import ImagePart, Part, Turn

# LLaVA's data mark an image by this word, with a newline between it and the text. The newline belongs to the
# mark: the chat template writes its own separator.
IMAGE_MARK = re.compile(r"\n?<image>\n?")

# Marks of other data. A word at the start or the end of a line is a mark; in a sentence, it is a word.
_STREAM_MARK = re.compile(r"^\s*<\|?(video|audio)\|?>|<\|?(video|audio)\|?>\s*$", re.MULTILINE)
_IMAGE_MARKS = re.compile(r"<image_?\d+>|<\|image(_\d+)?\|>|<ImageHere>|<img>[^<>\n]*</img>|<\|image_pad\|>")

_LEARNT = frozenset(LEARNT_KEYS)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which picture an image part shows: the row's next one, the row's picture `index`, or its `own` entry."""

    index: int | None = None
    own: Any = None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """turns: of the row;  places: one for each image part, in order"""

    turns: tuple[Turn, ...]
    places: tuple[Place, ...]


def parse_turns(messages: Sequence[dict[str, Any]]) -> tuple[Turn, ...]:
    """The turns of `parse_conversation`."""
    return parse_conversation(messages).turns


def parse_conversation(messages: Any) -> Conversation:
    """Parse messages with role and content, or LLaVA's with from and value. Raises SampleError.

    A list that is stored as JSON text, as tables without nested columns have it, is parsed.
    """
    if not messages:
        raise SampleError("no-messages", "the conversation is empty")
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise SampleError("bad-content", f"the conversation is a text that is not JSON: {error}") from error
    if not isinstance(messages, list):
        raise SampleError("bad-content", f"the conversation is a {type(messages).__name__}, expected a list of turns")
    places: list[Place] = []
    turns = tuple(_parse_turn(number, message, places) for number, message in enumerate(messages))
    if not turns:
        raise SampleError("no-messages", "the conversation is empty")
    return Conversation(turns=turns, places=tuple(places))


def _parse_turn(number: int, message: Any, places: list[Place]) -> Turn:
    """Parse one turn; its places are appended to `places`."""
    where = f"turn {number}"
    if not isinstance(message, dict):
        raise SampleError("bad-content", f"{where} is a {type(message).__name__}, expected role and content")
    check_known(TURN, where, message)
    said_by, content = _one_of(where, message, ROLE_KEYS), _one_of(where, message, CONTENT_KEYS)
    role = ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise SampleError("bad-role", f"{where} has role {said_by!r:.100}; expected one of {sorted(ROLES)}")
    if isinstance(content, str):
        parts = _split_text(_checked(content, where, role))
        found = [Place() for part in parts if isinstance(part, ImagePart)]
    elif isinstance(content, list):
        pairs = [_parse_part(where, role, part) for part in content]
        parts, found = tuple(part for part, _ in pairs), [place for _, place in pairs if place is not None]
    else:
        raise SampleError("bad-content", f"{where} has content of type {type(content).__name__}")
    if role == "assistant" and found:  # a student would learn to say the tokens around the image
        raise SampleError("image-in-answer", f"{where} is the assistant's and has an image")
    places += found
    return Turn(role=role, parts=parts, learnt=_learnt(where, role, message))


def _one_of(where: str, item: Mapping[str, Any], names: tuple[str, str]) -> Any:
    """The value that an item has under one of two names. Raises SampleError if it has both and they differ."""
    first, second = item.get(names[0]), item.get(names[1])
    if first is not None and second is not None and first != second:
        raise SampleError(CONTRADICTORY, f"{where} has {' and '.join(map(repr, names))}, and they differ")
    return second if first is None else first


def _learnt(where: str, role: str, message: Mapping[str, Any]) -> bool:
    """Whether the turn is to be learnt: `loss`, `weight` and `train` may say no. Raises SampleError for a share."""
    if _LEARNT.isdisjoint(message):
        return True
    given = {name: message[name] for name in LEARNT_KEYS if not is_empty(message.get(name))}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise SampleError(
                UNREAD, f"{where} has {name} {value!r:.100}: a turn is learnt (1, true) or not (0, false)"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise SampleError(CONTRADICTORY, f"{where} has {' and '.join(f'{n} {v!r}' for n, v in given.items())}")
    if role != "assistant" and any(given.values()):
        name = next(iter(given))
        raise SampleError(UNREAD, f"{where} has {name} {given[name]!r}, and only the assistant's turns are learnt")
    return role != "assistant" or all(given.values())


def _checked(text: str, where: str, role: str) -> str:
    """Return the text. Raises SampleError for a lone surrogate, which no tokenizer accepts, and for a mark that means
    a picture or a video in other data and is only text here."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad-content", f"{where} has a text that is not valid Unicode: {error}") from error
    if role == "assistant" or "<" not in text:
        return text
    stream, image = _STREAM_MARK.search(text), _IMAGE_MARKS.search(text)
    if stream is not None and f"</{stream[1] or stream[2]}>" not in text:  # HTML has both
        kind = stream[1] or stream[2]
        raise SampleError({"video": VIDEO, "audio": AUDIO}[kind], f"{where} marks {kind} by {stream[0].strip()!r}")
    if image is not None:
        raise SampleError(IMAGE, f"{where} marks a picture by {image[0]!r:.200}; emkd reads the mark '<image>'")
    return text


def _split_text(text: str) -> tuple[Part, ...]:
    if "<image>" not in text:  # most texts
        return (text,) if text else ()
    texts = IMAGE_MARK.split(text)
    parts: list[Part] = [texts[0]]
    for following in texts[1:]:
        parts += [ImagePart(), following]
    return tuple(part for part in parts if part != "")


def _parse_part(where: str, role: str, part: Any) -> tuple[Part, Place | None]:
    if not isinstance(part, dict):
        raise SampleError("bad-content", f"{where} has a part that is neither text nor image: {part!r:.200}")
    kind = part.get("type")
    stream = name_kind(kind) if isinstance(kind, str) else None
    if stream in (VIDEO, AUDIO):
        raise SampleError(stream, f"{where} has a part of type {kind!r:.100}")
    check_known(PART, f"a part of {where}", part)
    own = [name for name in OWN_IMAGE_KEYS if not is_empty(part.get(name))]
    if kind in ("image", "image_url"):
        if part.get("text"):
            raise SampleError(CONTRADICTORY, f"{where} has a part of type {kind!r} with a text")
        return ImagePart(), _place(where, part, own)
    if kind == "text" and isinstance(part.get("text"), str):
        stray = [*own, *(["index"] if part.get("index") is not None else [])]
        if stray:
            raise SampleError(CONTRADICTORY, f"{where} has a part of type 'text' with {stray[0]!r}")
        return _checked(part["text"], where, role), None
    raise SampleError("bad-content", f"{where} has a part that is neither text nor image: {part!r:.200}")


def _place(where: str, part: Mapping[str, Any], own: Sequence[str]) -> Place:
    index = part.get("index")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
        raise SampleError("bad-content", f"{where} has an image part with index {index!r:.100}")
    if not own:
        return Place(index=index)
    if index is not None:
        raise SampleError(CONTRADICTORY, f"{where} has an image part with both 'index' and {own[0]!r}")
    if set(own) <= {"bytes", "path"}:
        return Place(own={name: part[name] for name in own})
    if len(own) > 1:
        raise SampleError(CONTRADICTORY, f"{where} has an image part with {' and '.join(map(repr, own))}")
    return Place(own=part[own[0]])
