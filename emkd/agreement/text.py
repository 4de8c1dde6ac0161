"""Whether teacher and student read the same conversation in the same way.

The losses compare text tokens, answer tokens and images one by one: each has to be the same one on both sides. What
families write around and within images (begin and end tokens, row and column tokens) may differ, and is left out then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from emkd.errors import TokenizerMismatchError
from emkd.samples.encode import Encoded
from emkd.storage.record import ImageSpan

CONTEXT_TOKENS = 8  # shown before the first one that differs

Words = Callable[[list[int]], str]


class Reading(Protocol):
    """What is compared; both `Encoded` and `Record` have it. Arrays of any kind: [L] and [A]."""

    @property
    def text_ids(self) -> Any: ...
    @property
    def answer_positions(self) -> Any: ...
    @property
    def images(self) -> Sequence[ImageSpan]: ...


def check_same_text(student: Reading, teacher: Reading, row: int, *, words: Words | None = None) -> None:
    """Raises TokenizerMismatchError unless student and teacher saw the same text tokens around the images, with the
    same ones as answers.

    words: the text of token ids (`Encoder.words`), so that the message shows it; called only where they differ
    """
    ours, theirs = student.text_ids.tolist(), teacher.text_ids.tolist()
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        raise TokenizerMismatchError(
            f"row {row}: the student's text is {len(ours)} tokens and the teacher's {len(theirs)}; they differ first "
            f"at text token {place}: student {_at(ours, place, words)}, teacher {_at(theirs, place, words)}"
            f"{_after(ours[:place], words)}. Both need the same tokenizer and chat template"
        )
    ours, theirs = student.answer_positions.tolist(), teacher.answer_positions.tolist()
    if ours != theirs:
        raise TokenizerMismatchError(
            f"row {row}: {len(ours)} tokens are answers for the student and {len(theirs)} were for the teacher, or "
            "other ones: their chat templates mark answers differently. Give the student the teacher's chat template"
        )
    if [i.text_position for i in student.images] != [i.text_position for i in teacher.images]:
        raise TokenizerMismatchError(f"row {row}: images stand at other places of the text than for the teacher")


@dataclass(frozen=True)
class SharedText:
    """Indices [M] of the text tokens that both read, ascending, in the student's and in the teacher's text."""

    own: torch.Tensor
    theirs: torch.Tensor


def shared_text(
    student: Encoded, teacher: Reading, row: int, *, other_family: bool, words: Words | None = None
) -> SharedText | None:
    """None where both read the very same text around their images; else the text that both read, without what they
    write around and within images. Raises TokenizerMismatchError as `check_same_text`, where something else differs.

    other_family: whether they may differ there; models of one family write the same, unless something is wrong
    """
    if not other_family:
        check_same_text(student, teacher, row, words=words)
        return None
    places = [[image.text_position for image in side.images] for side in (student, teacher)]
    if student.text_ids.tolist() == teacher.text_ids.tolist() and places[0] == places[1]:
        check_same_text(student, teacher, row, words=words)
        return None
    if len(student.images) != len(teacher.images):
        raise TokenizerMismatchError(
            f"row {row}: {len(student.images)} images for the student, {len(teacher.images)} for the teacher"
        )
    found = _aligned(student, teacher, row, words)
    index = {there: here for here, there in zip(found.own.tolist(), found.theirs.tolist(), strict=True)}
    if student.answer_positions.tolist() != [index.get(place) for place in teacher.answer_positions.tolist()]:
        raise TokenizerMismatchError(
            f"row {row}: other tokens are answers for the student than for the teacher: their chat templates mark "
            "answers differently. Give the student the teacher's chat template"
        )
    return found


def _aligned(student: Encoded, teacher: Reading, row: int, words: Words | None) -> SharedText:
    """Piece by piece of the text between images. Raises TokenizerMismatchError where a piece of the student's is not in
    the teacher's, or more than once."""
    own, theirs = [], []
    pieces = list(zip(_pieces(student), _pieces(teacher), strict=True))
    for number, (ours, others) in enumerate(pieces):
        kept = [place for place in ours if not student.in_image[place]]
        wanted = [int(student.text_ids[place]) for place in kept]
        there = [int(teacher.text_ids[place]) for place in others]
        start = _where(wanted, there, begins=number == 0, ends=number == len(pieces) - 1)
        if start is None:
            where = (
                f"between images {number} and {number + 1}"
                if 0 < number < len(pieces) - 1
                else ("before the first image" if number == 0 else "behind the last image")
            )
            raise TokenizerMismatchError(
                f"row {row}: {where} the student reads {_shown(wanted, there, words)}, the teacher "
                f"{_shown(there, wanted, words)}: they differ in more than what their families write around and within "
                "images. Both need the same tokenizer and chat template"
            )
        own += kept
        theirs += list(others[start : start + len(wanted)])
    return SharedText(torch.tensor(own, dtype=torch.long), torch.tensor(theirs, dtype=torch.long))


def _pieces(reading: Reading) -> list[range]:
    """Places in the text before, between and behind the images."""
    ends = [0, *(image.text_position for image in reading.images), len(reading.text_ids)]
    return [range(first, last) for first, last in pairwise(ends)]


def _where(wanted: list[int], there: list[int], *, begins: bool, ends: bool) -> int | None:
    """The one place at which `wanted` stands; at the very beginning or end of the conversation, where no image is on
    that side. None where there is no such place, or more than one."""
    last = len(there) - len(wanted)
    if last < 0:
        return None
    starts = range(1) if begins else range(last, last + 1) if ends else range(last + 1)
    if begins and ends and last:
        return None
    found = [start for start in starts if there[start : start + len(wanted)] == wanted]
    return found[0] if len(found) == 1 or (found and not wanted) else None


def _at(ids: Sequence[int], place: int, words: Words | None) -> str:
    if place >= len(ids):
        return "nothing"
    return f"id {ids[place]}" if words is None else f"{words([ids[place]])!r} (id {ids[place]})"


def _shown(ids: list[int], other: list[int], words: Words | None) -> str:
    """Token ids, from a little before the first that stands nowhere in the other text, or from their begin."""
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
