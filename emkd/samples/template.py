"""The student takes over the teacher's chat template: both read the same text, each with its own image tokens."""

from dataclasses import dataclass
from typing import Any

from emkd.errors import SampleError, TokenizerMismatchError
from emkd.samples.render import render, template_of
from emkd.samples.sample import ImagePart, Part, Turn

# A word that no template contains.
_WORD = "Xq7"
_SYSTEM = Turn(role="system", parts=("s",))


@dataclass(frozen=True)
class Adopted:
    """What became of a student's chat template.

    changed: whether the student had another template, or none
    guessed: the placeholder that now stands for an image, because the student had no template that shows how its family
             writes one. None if this is known
    """

    changed: bool
    guessed: str | None = None


def adopt_template(processor: Any, template: str | None) -> Adopted:
    """Give a student's processor the teacher's template.

    template: the teacher's; None, in a cache that does not have it, leaves the processor unchanged

    If the student's family writes images differently, its way replaces the teacher's in the template. From then on the
    student is rendered, saved (processor and tokenizer share one file) and loaded with this template. Call this before
    you make an `Encoder`, which keeps what it has rendered.
    """
    if template is None:
        return Adopted(changed=False)
    present, guessed = template_of(processor), None
    own = None if present is None else image_text(processor)
    _give(processor, template)
    theirs = image_text(processor)
    if theirs and theirs.count(processor.image_token) != 1 and theirs in template:
        guessed = None if own else str(processor.image_token)
        _give(processor, template.replace(theirs, own or str(processor.image_token)))
    return Adopted(changed=present != template_of(processor), guessed=guessed)


def _give(processor: Any, template: str) -> None:
    processor.chat_template = processor.tokenizer.chat_template = template


def describe_guess(guessed: str) -> str:
    """For the log: what `Adopted.guessed` means."""
    return (
        f"the student has no chat template that accepts a question about an image, so it is not known what its family "
        f"writes around images: emkd writes {guessed!r} alone. If that is wrong, save the family's "
        "chat_template.jinja in the student's folder"
    )


def image_text(processor: Any) -> str | None:
    """What the template writes for an image, such as "<|vision_start|><|image_pad|><|vision_end|>".

    "" if it writes nothing; None if it accepts no question about an image, alone or after a system turn.
    """
    for before in ((), (_SYSTEM,)):
        try:
            (without, _), (text, _) = (
                render(processor, (*before, *_question(parts))) for parts in ((_WORD,), (ImagePart(), _WORD))
            )
        except SampleError:
            continue
        first = _in_common(text, without)
        last = _in_common(text[first:][::-1], without[first:][::-1])
        return text[first : len(text) - last].strip()
    return None


def _in_common(one: str, other: str) -> int:
    """The length of the common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _question(parts: tuple[Part, ...]) -> tuple[Turn, ...]:
    return (Turn(role="user", parts=parts), Turn(role="assistant", parts=("b",)))


def check_places_images(processor: Any) -> None:
    """Raise TokenizerMismatchError if the template does not write the placeholder that this processor replaces.

    This is the template of a teacher of another family that could not be translated.
    """
    written = image_text(processor)
    if written is not None and written.count(processor.image_token) != 1:
        raise TokenizerMismatchError(
            f"the teacher's chat template writes {written!r} for an image, the student's {type(processor).__name__} "
            f"replaces {processor.image_token!r} by vision tokens. "
            + ("It drops images" if not written else "The template does not contain that text literally")
            + ", so emkd cannot translate it: let the teacher's chat_template.jinja write its placeholder literally, "
            "and make the cache again with that template"
        )
