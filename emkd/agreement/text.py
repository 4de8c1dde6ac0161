"""Whether teacher and student read the same conversation in the same way.

The losses compare text tokens, answer tokens and images one by one, so each must be the same on both sides. What
families write around and within images (begin and end tokens, row and column tokens) may differ, and is then left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from emkd.errors import TokenizerMismatchError
from emkd.samples.encode import Encoded
from emkd.storage.record import ImageSpan

CONTEXT_TOKENS = 8  # shown before the first token that differs

Words = Callable[[list[int]], str]


class Reading(Protocol):
    """The part of `Encoded` and `Record` that is compared. Arrays of any kind: [L] and [A]."""

    @property
    def text_ids(self) -> Any: ...
    @property
    def answer_positions(self) -> Any: ...
    @property
    def images(self) -> Sequence[ImageSpan]: ...


def check_same_text(
    student: Reading, teacher: Reading, row: int, *, words: Words | None = None, name: str = "student"
) -> None:
    """Check that both read the same text tokens around the images, with the same ones as answers.

    Raises TokenizerMismatchError, which shows the first text token that differs.

    words: decodes token ids for the message (`Encoder.words`); called only if something differs
    name: what messages call the model that reads the cache
    """
    ours, theirs = student.text_ids.tolist(), teacher.text_ids.tolist()
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False))
        first = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        raise TokenizerMismatchError(
            f"row {row}: the {name}'s text has {len(ours)} tokens and the teacher's {len(theirs)}; they differ first "
            f"at text token {first}: {name} {_at(ours, first, words)}, teacher {_at(theirs, first, words)}"
            f"{_after(ours[:first], words)}. Both need the same tokenizer and chat template"
        )
    ours, theirs = student.answer_positions.tolist(), teacher.answer_positions.tolist()
    if ours != theirs:
        raise TokenizerMismatchError(
            f"row {row}: the answer tokens differ ({len(ours)} of the {name}, {len(theirs)} of the teacher): the two "
            f"chat templates mark answers differently. Give the {name} the teacher's chat template. If the "
            "conversation begins with the assistant, an older emkd has made the cache and took that turn's header for "
            "a part of the answer: make the cache again"
        )
    if [i.text_position for i in student.images] != [i.text_position for i in teacher.images]:
        raise TokenizerMismatchError(
            f"row {row}: the {name} and the teacher have the images at different positions in the text"
        )


@dataclass(frozen=True)
class SharedText:
    """Indices [M] of the text tokens that both read, ascending, in the student's and in the teacher's text."""

    own: torch.Tensor
    theirs: torch.Tensor


def shared_text(
    student: Encoded, teacher: Reading, row: int, *, other_family: bool, words: Words | None = None
) -> SharedText | None:
    """Return the text tokens that both read, without what they write around and within images.

    None if both read exactly the same text around their images. Raises TokenizerMismatchError, as `check_same_text`
    does, if anything else differs.

    other_family: whether they may differ around images; models of one family write the same, unless something is wrong
    """
    if not other_family:
        check_same_text(student, teacher, row, words=words)
        return None
    positions = [[image.text_position for image in side.images] for side in (student, teacher)]
    if student.text_ids.tolist() == teacher.text_ids.tolist() and positions[0] == positions[1]:
        check_same_text(student, teacher, row, words=words)
        return None
    if len(student.images) != len(teacher.images):
        raise TokenizerMismatchError(
            f"row {row}: {len(student.images)} images for the student, {len(teacher.images)} for the teacher"
        )
    found = _aligned(student, teacher, row, words)
    index = {there: here for here, there in zip(found.own.tolist(), found.theirs.tolist(), strict=True)}
    if student.answer_positions.tolist() != [index.get(position) for position in teacher.answer_positions.tolist()]:
        raise TokenizerMismatchError(
            f"row {row}: the answer tokens of student and teacher differ: the two chat templates mark answers "
            "differently. Give the student the teacher's chat template"
        )
    return found


def _aligned(student: Encoded, teacher: Reading, row: int, words: Words | None) -> SharedText:
    """Align the text between images piece by piece.

    Raises TokenizerMismatchError if a piece of the student's text is not in the teacher's, or is there more than once.
    """
    own, theirs = [], []
    pieces = list(zip(_pieces(student), _pieces(teacher), strict=True))
    for number, (ours, others) in enumerate(pieces):
        kept = [n for n in ours if not student.in_image[n]]
        wanted = [int(student.text_ids[n]) for n in kept]
        there = [int(teacher.text_ids[n]) for n in others]
        start = _find(wanted, there, first=number == 0, last=number == len(pieces) - 1)
        if start is None:
            raise TokenizerMismatchError(
                f"row {row}: {_where(number, len(pieces))} the student reads {_shown(wanted, there, words)}, the "
                f"teacher {_shown(there, wanted, words)}: they differ in more than what their families write around "
                "and within images. Both need the same tokenizer and chat template"
            )
        own += kept
        theirs += list(others[start : start + len(wanted)])
    return SharedText(torch.tensor(own, dtype=torch.long), torch.tensor(theirs, dtype=torch.long))


def _where(number: int, n_pieces: int) -> str:
    """Which piece of the text, in words."""
    if 0 < number < n_pieces - 1:
        return f"between images {number} and {number + 1}"
    return "before the first image" if number == 0 else "after the last image"


def _pieces(reading: Reading) -> list[range]:
    """Text positions before, between and after the images."""
    ends = [0, *(image.text_position for image in reading.images), len(reading.text_ids)]
    return [range(first, last) for first, last in pairwise(ends)]


def _find(wanted: list[int], there: list[int], *, first: bool, last: bool) -> int | None:
    """The only index at which `wanted` starts in `there`. None if there is none, or more than one.

    The first piece of a conversation must start at its beginning and the last one end at its end: there is no image on
    that side.
    """
    latest = len(there) - len(wanted)
    if latest < 0:
        return None
    starts = range(1) if first else range(latest, latest + 1) if last else range(latest + 1)
    if first and last and latest:
        return None
    found = [start for start in starts if there[start : start + len(wanted)] == wanted]
    return found[0] if len(found) == 1 or (found and not wanted) else None


def _at(ids: Sequence[int], index: int, words: Words | None) -> str:
    if index >= len(ids):
        return "nothing"
    return f"id {ids[index]}" if words is None else f"{words([ids[index]])!r} (id {ids[index]})"


def _shown(ids: list[int], other: list[int], words: Words | None) -> str:
    """Token ids, starting shortly before the first id that the other text lacks, or at the first id."""
    known = set(other)
    first = max(0, next((n for n, token in enumerate(ids) if token not in known), 0) - CONTEXT_TOKENS // 2)
    some = ids[first : first + 2 * CONTEXT_TOKENS]
    left_out = "... " * (first > 0), " ..." * (len(ids) > first + len(some))
    text = "" if words is None or not some else f"{left_out[0] + words(some) + left_out[1]!r} "
    return f"{text}(ids {some})" if some else "nothing"


def _after(ids: list[int], words: Words | None) -> str:
    """What both read before."""
    if words is None or not ids:
        return ""
    cut = "... " if len(ids) > CONTEXT_TOKENS else ""
    return f", after {cut + words(ids[-CONTEXT_TOKENS:])!r}"
