"""One row of a dataset, parsed: its id, its turns, and access to its images.

    Dataset.row(17) -> ParsedRow -> .id, .text_sha256 -> .sample() -> Sample

The row is read from its file once and parsed once; everything that is known without its images is here.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emkd.errors import SampleError
from emkd.samples.images import read_image_bytes
from emkd.samples.sample import Sample, Turn, check_image_count, parse_turns, sample_key, text_sha256
from emkd.samples.sources import CONVERSATION_COLUMNS, IMAGE_COLUMNS, RawRow


@dataclass(frozen=True, kw_only=True)
class ParsedRow:
    """A row whose conversation is parsed and whose images are not read yet.

    row:        0-based over all files of the dataset
    id:         the row's own id, "" if it has none or cannot be read
    turns:      the conversation; empty if `error` says why it cannot be used
    images:     the row's image entries, in order (see `read_image_bytes`)
    image_root: the folder that paths among them start from
    """

    row: int
    id: str
    turns: tuple[Turn, ...]
    error: SampleError | None
    images: tuple[Any, ...]
    image_root: Path | None

    @classmethod
    def of(cls, row: int, raw: RawRow | SampleError, image_root: Path | None) -> "ParsedRow":
        """Parse a row as its file has it, or keep the error of one that cannot be read."""
        if isinstance(raw, SampleError):
            return cls(row=row, id="", turns=(), error=raw, images=(), image_root=image_root)
        entries: Any = next((raw[name] for name in IMAGE_COLUMNS if raw.get(name)), [])
        entries = entries if isinstance(entries, list) else [entries]  # LLaVA names a single image without a list
        turns, error = _turns(raw)
        return cls(row=row, id=_id(raw), turns=turns, error=error, images=tuple(entries), image_root=image_root)

    @cached_property
    def text_sha256(self) -> str:
        """Hash of the row's roles and texts, "" if it has no conversation that can be read."""
        return "" if self.error is not None else text_sha256(self.turns)

    def sample(self) -> Sample:
        """Read the row's images, without decoding them. Raises SampleError if the row cannot be used, OSError."""
        if self.error is not None:  # raised itself, it would hold this row, which holds it
            raise SampleError(self.error.reason, self.error.detail) from self.error
        check_image_count(self.turns, len(self.images))
        images = tuple(read_image_bytes(entry, self.image_root) for entry in self.images)
        return Sample(row=self.row, id=self.id, key=sample_key(self.turns, images), turns=self.turns, images=images)


def text_hash(raw: RawRow | SampleError) -> str:
    """`ParsedRow.text_sha256` of a row whose images were not even read from the file."""
    turns, error = ((), raw) if isinstance(raw, SampleError) else _turns(raw)
    return "" if error is not None else text_sha256(turns)


def _turns(raw: RawRow) -> tuple[tuple[Turn, ...], SampleError | None]:
    try:
        return parse_turns(next((raw[name] for name in CONVERSATION_COLUMNS if raw.get(name)), [])), None
    except SampleError as error:
        return (), error


def _id(raw: RawRow) -> str:
    """A lone surrogate is escaped: the index could not store it."""
    value = raw.get("id")
    return "" if value is None else str(value).encode(errors="backslashreplace").decode()
