"""Whether teacher and student read the same conversation in the same way.

The losses compare text tokens, answer tokens and images one by one: each has to be the same one on both sides.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from emkd.errors import TokenizerMismatchError
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


def _at(ids: Sequence[int], place: int, words: Words | None) -> str:
    if place >= len(ids):
        return "nothing"
    return f"id {ids[place]}" if words is None else f"{words([ids[place]])!r} (id {ids[place]})"


def _after(ids: list[int], words: Words | None) -> str:
    """What both read before."""
    if words is None or not ids:
        return ""
    cut = "... " if len(ids) > CONTEXT_TOKENS else ""
    return f", after {cut + words(ids[-CONTEXT_TOKENS:])!r}"
