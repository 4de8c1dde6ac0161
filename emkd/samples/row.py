"""One row of a dataset, parsed: its id, its turns, and access to its images.

    Dataset.row(17) -> ParsedRow -> .id, .text_sha256 -> .sample() -> Sample

The row is read from its file once and parsed once; everything that is known without its images is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from emkd.errors import SampleError
from emkd.samples.conversation import Conversation, Place, parse_conversation
from emkd.samples.image_entry import ImageFolder, read_image_bytes
from emkd.samples.known import CONTRADICTORY, CONVERSATION_COLUMNS, IMAGE_COLUMNS, ROW, check_known, is_empty
from emkd.samples.sample import Sample, Turn, sample_key, text_sha256
from emkd.samples.sources.source import RawRow
from emkd.text import one_line

MAX_ID = 1000  # characters


@dataclass(frozen=True, kw_only=True)
class ParsedRow:
    """A row whose conversation is parsed and whose images are not read yet.

    row:         0-based over all files of the dataset
    id:          the row's own id, "" if it has none or cannot be read
    turns:       the conversation; empty if `error` says why it cannot be used
    images:      an entry for each image part of the turns, in order (see `read_image_bytes`)
    image_error: why the row's other columns forbid to use it, or its images do not fit its conversation
    folder:      what paths among the images start from
    """

    row: int
    id: str
    turns: tuple[Turn, ...]
    error: SampleError | None
    images: tuple[Any, ...] = ()
    image_error: SampleError | None = None
    folder: ImageFolder

    @classmethod
    def of(cls, row: int, raw: RawRow | SampleError, folder: ImageFolder) -> "ParsedRow":
        """Parse a row as its file has it, or keep the error of one that cannot be read."""
        if isinstance(raw, SampleError):
            return cls(row=row, id="", turns=(), error=raw, folder=folder)
        found = _conversation(raw)
        if isinstance(found, SampleError):
            # A column that is not read may be what the row is about; it explains more than a missing conversation.
            return cls(row=row, id=_id(raw), turns=(), error=_unread(raw) or found, folder=folder)
        images: tuple[Any, ...] = ()
        image_error = _unread(raw)
        if image_error is None:
            try:
                images = _images(raw, found.places)
            except SampleError as error:
                image_error = error
        return cls(
            row=row, id=_id(raw), turns=found.turns, error=None, images=images, image_error=image_error, folder=folder
        )

    @cached_property
    def text_sha256(self) -> str:
        """Hash of the row's roles and texts, "" if it has no conversation that can be read."""
        return "" if self.error is not None else text_sha256(self.turns)

    def sample(self) -> Sample:
        """Read the row's images, without decoding them. Raises SampleError if the row cannot be used, OSError."""
        error = self.error or self.image_error
        if error is not None:  # raised itself, it would hold this row, which holds it
            raise SampleError(error.reason, error.detail) from error
        images = tuple(read_image_bytes(entry, self.folder) for entry in self.images)
        return Sample(row=self.row, id=self.id, key=sample_key(self.turns, images), turns=self.turns, images=images)


def text_hash(raw: RawRow | SampleError) -> str:
    """`ParsedRow.text_sha256` of a row of which only the conversation was read from the file."""
    found = raw if isinstance(raw, SampleError) else _conversation(raw)
    return "" if isinstance(found, SampleError) else text_sha256(found.turns)


def image_entries(raw: RawRow) -> list[Any]:
    """The row's own image entries. Raises SampleError if two columns have different ones."""
    values = [raw[name] for name in IMAGE_COLUMNS if raw.get(name)]
    values = [value for value in values if not is_empty(value)] or values[:1]
    found = [value if isinstance(value, list) else [value] for value in values]  # LLaVA names one without a list
    if len(found) > 1 and found[0] != found[1]:
        names = " and ".join(map(repr, IMAGE_COLUMNS))
        raise SampleError(CONTRADICTORY, f"the row has {names}, and they differ; keep the one that its messages mark")
    return found[0] if found else []


def _unread(raw: RawRow) -> SampleError | None:
    """Why the row's columns beside the conversation forbid to use it, if they do."""
    has_images = any(not is_empty(raw.get(name)) for name in IMAGE_COLUMNS)
    try:
        check_known(ROW, "the row", raw, has_images=has_images)
    except SampleError as error:
        return error
    return None


def _conversation(raw: RawRow) -> Conversation | SampleError:
    given = [raw[name] for name in CONVERSATION_COLUMNS if raw.get(name)]
    try:
        found = parse_conversation(given[0] if given else [])
        if len(given) > 1 and parse_conversation(given[1]) != found:
            names = " and ".join(map(repr, CONVERSATION_COLUMNS))
            raise SampleError(CONTRADICTORY, f"the row has {names}, and they differ")
    except SampleError as error:
        return error
    return found


def _images(raw: RawRow, places: Sequence[Place]) -> tuple[Any, ...]:
    """The entry of each place. Raises SampleError unless the places name each image: guessing would show the model
    another prompt."""
    entries = image_entries(raw)
    own = [place.own for place in places if place.own is not None]
    indices = [place.index for place in places if place.index is not None]
    if own:
        if entries:
            raise SampleError(CONTRADICTORY, "parts of the messages bring their own pictures, and the row has others")
        if len(own) < len(places):
            raise SampleError("image-count", f"{len(places)} images are marked, {len(own)} of them bring a picture")
        return tuple(own)
    if indices:
        if len(indices) < len(places):
            raise SampleError(CONTRADICTORY, f"{len(indices)} of {len(places)} image parts have an index")
        if set(indices) != set(range(len(entries))):
            raise SampleError(
                "image-count", f"the messages show the images {sorted(set(indices))} and the row has {len(entries)}"
            )
        return tuple(entries[index] for index in indices)
    if not places and is_empty(entries):  # {bytes: null, path: null} in a row without pictures
        return ()
    if len(places) != len(entries):
        raise SampleError(
            "image-count",
            f"the messages mark {len(places)} images (by <image> or a part of type image) and the row has "
            f"{len(entries)}",
        )
    return tuple(entries)


def _id(raw: RawRow) -> str:
    value = raw.get("id")
    return "" if value is None else one_line(str(value), MAX_ID)
