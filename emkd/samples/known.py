"""What is known of a row: the names that emkd reads, and what it makes of every other name.

A row is foreign: it may have any column, its turns any key, its parts any key. Whatever emkd drops could be what the
row is about, so that nothing is dropped unseen:

    read          `Level.read` has the name: it decides what the model sees or learns
    names media   a video, audio or pictures that emkd does not read: the row is skipped, with the name
    would change  `Level.refused` has the name: it would change what is learnt, and the row is skipped with the name
    other         listed once for the whole dataset (see `Dataset.unread`)

A name without a value (null, "", [], {bytes: null, path: null}) counts as absent: Parquet has every column in all rows.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from emkd.errors import SampleError

# Either name works, in Parquet as in JSON. A row that has both with different content is refused.
CONVERSATION_COLUMNS = ("messages", "conversations")
IMAGE_COLUMNS = ("images", "image")
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
LEARNT_KEYS = ("loss", "weight", "train")  # 0 and false: the turn is no answer
OWN_IMAGE_KEYS = ("image", "image_url", "url", "bytes", "path")  # of a part that brings its own picture

VIDEO, AUDIO, IMAGE = "video", "audio", "unread-image"
UNREAD, CONTRADICTORY = "unread-key", "contradictory"


@dataclass(frozen=True, kw_only=True)
class Level:
    """Where a name stands: in a row, in a turn of its conversation, or in a part of a turn's content."""

    read: frozenset[str]
    refused: frozenset[str]


ROW = Level(
    read=frozenset(("id", *CONVERSATION_COLUMNS, *IMAGE_COLUMNS)),
    refused=frozenset(
        ("system", "system_prompt", "tools", "functions", "chosen", "rejected", "history", "loss_mask", *LEARNT_KEYS)
    ),
)
TURN = Level(
    read=frozenset((*ROLE_KEYS, *CONTENT_KEYS, *LEARNT_KEYS)),
    refused=frozenset(
        ("tool_calls", "function_call", "tools", "functions", "reasoning_content", "reasoning", "thinking", "loss_mask")
    ),
)
PART = Level(
    read=frozenset(("type", "text", "index", *OWN_IMAGE_KEYS)),
    refused=frozenset(
        ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "fps", "nframes", *LEARNT_KEYS)
    ),
)

# Words of names, with what they may be joined to without a separator: imgs, imagepath, video_url, pixelValues.
_TAIL = r"(s|path|url|uri|link|file|name|data|byte|b64|base64|list|value|embed|feature|array|tensor|\d)*"
_WORDS = {
    VIDEO: re.compile(rf"(video|mp4|mkv|webm){_TAIL}"),
    AUDIO: re.compile(rf"(audio|wav|mp3|flac|waveform){_TAIL}"),
    IMAGE: re.compile(rf"(image|img|picture|photo|pic|pixel|screenshot|thumbnail|jpe?g|png|webp|gif|bmp|tiff?){_TAIL}"),
}
# Words that say of media what they are like: `image_size` is no picture.
_DESCRIBING = frozenset({
    "size", "sizes", "width", "height", "hw", "wh", "thw", "grid", "count", "counts", "num", "n", "format", "mode",
    "type", "types", "mime", "license", "description", "descriptions", "desc", "caption", "captions", "text",
    "texts", "transcript", "title", "question", "answer", "source", "sources", "origin", "dataset", "split",
    "correspondence", "rating", "ratings", "score", "scores", "quality", "min", "max", "mean", "std", "hash", "sha1",
    "sha256", "md5", "phash", "token", "tokens", "duration", "fps", "rate", "time", "date", "author", "category",
    "categories", "class", "label", "labels", "lang", "language", "is", "has",
})  # fmt: skip
# Words that say where media are: with `image_id` and no picture, the row has lost its picture.
_POINTING = frozenset({"id", "ids", "name", "names", "key", "keys", "idx", "indices", "index"})
_EXTENSIONS = {
    VIDEO: "mp4|mkv|webm|avi|mov|m4v|mpe?g",
    AUDIO: "wav|mp3|flac|ogg|opus|m4a|aac",
    IMAGE: "png|jpe?g|webp|gif|bmp|tiff?|avif|heic",
}
_FILES = {kind: re.compile(rf"\S{{1,1000}}\.({names})(\?\S*)?", re.IGNORECASE) for kind, names in _EXTENSIONS.items()}
_MAX_DEPTH = 6


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, NaN, an empty text, or a list or object of nothing else."""
    if value is None or value != value:
        return True
    if isinstance(value, Mapping):
        return all(is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(inner) for inner in value)
    return isinstance(value, str | bytes) and not value


def check_known(level: Level, where: str, item: Mapping[str, Any], *, has_images: bool = False) -> None:
    """Raise SampleError(video | audio | unread-image | unread-key) for a name that is not read and must not be dropped.

    where:      for the message, such as "turn 2"
    has_images: the row has images that are read, so that a path elsewhere tells where they come from
    """
    if level.read.issuperset(item):  # nearly all rows, and text hashes of all rows are computed at the start
        return
    for name, value in item.items():
        if name in level.read or is_empty(value):
            continue
        kind = media_kind(name, value, has_images=has_images)
        if kind is not None:
            what = {VIDEO: "a video", AUDIO: "audio"}.get(kind, "a picture")
            raise SampleError(
                kind,
                f"{where} has {name!r}, which holds or names {what} and is not read: pictures belong into a column "
                "images; remove the name if the row does not need it",
            )
        if name in level.refused and not (name in LEARNT_KEYS and value == 1):
            raise SampleError(
                UNREAD, f"{where} has {name!r}, which would change what is learnt and is not read; remove or convert it"
            )


def media_kind(name: str, value: object, *, has_images: bool) -> str | None:
    """What a name that is not read holds: VIDEO, AUDIO, IMAGE, or None if it holds no media."""
    named = name_kind(name)
    if named is not None and not isinstance(value, int | float):
        return named
    if not has_images and named is None and value and _POINTING & set(words(name)):
        pointed = next((kind for kind in map(_word_kind, words(name)) if kind is not None), None)
        if pointed is not None:
            return pointed
    return _held(value, has_images, 0)


@lru_cache(maxsize=4096)
def name_kind(name: str) -> str | None:
    """The kind of media that a name promises: `image_path` does, `image_size` and `image_id` do not."""
    found = words(name)
    if (_DESCRIBING | _POINTING) & set(found):
        return None
    return next((kind for kind in map(_word_kind, found) if kind is not None), None)


def words(name: str) -> list[str]:
    """The words of a name: imageUrl and image-url have the same ones."""
    parted = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return [word.lower() for word in re.split(r"[^A-Za-z0-9]+", parted) if word]


def _word_kind(word: str) -> str | None:
    return next((kind for kind, pattern in _WORDS.items() if pattern.fullmatch(word)), None)


def _held(value: object, has_images: bool, depth: int) -> str | None:
    """The kind of media that a value is, or that stands in it. Paths count only in a row without images."""
    if isinstance(value, bytes | bytearray | memoryview):
        return IMAGE
    if isinstance(value, str):
        return None if has_images else text_kind(value)
    inner: list[object] = []
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        if not has_images:
            kinds = (name_kind(str(n)) for n, v in value.items() if not is_empty(v) and not isinstance(v, int | float))
            named = next((kind for kind in kinds if kind is not None), None)
            if named is not None:
                return named
        inner = list(value.values())
    elif isinstance(value, list | tuple) and depth < _MAX_DEPTH:
        inner = list(value)
    return next((kind for kind in (_held(item, has_images, depth + 1) for item in inner) if kind is not None), None)


def text_kind(text: str) -> str | None:
    """The kind of media that a text names: a path or URL of a media file, or a data: URI."""
    if text.startswith("data:"):
        start = text[5:16].lower()
        return next(
            (k for k, t in ((IMAGE, "image/"), (VIDEO, "video/"), (AUDIO, "audio/")) if start.startswith(t)), None
        )
    if len(text) > 1100 or text.startswith("<"):
        return None
    return next((kind for kind, pattern in _FILES.items() if pattern.fullmatch(text)), None)


def is_media_name(name: str) -> bool:
    """Whether a name has a word for media, also if it only describes or points: `image_id`."""
    return any(_word_kind(word) is not None for word in words(name))


def is_unread(level: Level, name: str) -> bool:
    """Whether a name is neither read nor ever a reason to skip a row because of the name itself."""
    return name not in level.read and name not in level.refused and name_kind(name) is None


def unread_in_rows(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """The names in rows of which `is_unread` is true: `source`, `messages[].name`, `messages[].content[].detail`."""
    found: dict[tuple[str, Level], set[str]] = defaultdict(set)  # names by where they stand
    for row in rows:
        found["", ROW].update(row)
        for column in CONVERSATION_COLUMNS:
            for turn in _objects(row.get(column)):
                found[f"{column}[].", TURN].update(turn)
                for key in CONTENT_KEYS:
                    for part in _objects(turn.get(key)):
                        found[f"{column}[].{key}[].", PART].update(part)
    return {where + name for (where, level), names in found.items() for name in names if is_unread(level, name)}


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
