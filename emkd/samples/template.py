"""The teacher's chat template as the student's: both read the same text, each with its own way to write an image."""

from dataclasses import dataclass
from typing import Any

from emkd.errors import SampleError, TokenizerMismatchError
from emkd.samples.render import render, template_of
from emkd.samples.sample import ImagePart, Part, Turn

# In no template.
_WORD = "Xq7"
_SYSTEM = Turn(role="system", parts=("s",))


@dataclass(frozen=True)
class Adopted:
    """What became of a student's chat template.

    changed: whether it had another one, or none
    guessed: what stands for an image now because the student had no template to say how its family writes one: the
             placeholder alone. None where it is known
    """

    changed: bool
    guessed: str | None = None


def adopt_template(processor: Any, template: str | None) -> Adopted:
    """Gives a student's processor the teacher's template.

    What the template writes for an image becomes what the student's family writes for one, where that is another thing.
    Saved (the processor's and the tokenizer's share one file), loaded and rendered, the template is the student's from
    then on; an `Encoder` keeps what it rendered, so that this comes before it is made.
    A cache that does not know its teacher's template (None) leaves the processor as it is.
    """
    if template is None:
        return Adopted(changed=False)
    present, guessed = template_of(processor), None
    own = None if present is None else image_place(processor)
    _give(processor, template)
    theirs = image_place(processor)
    if theirs and theirs.count(processor.image_token) != 1 and theirs in template:
        guessed = None if own else str(processor.image_token)
        _give(processor, template.replace(theirs, own or str(processor.image_token)))
    return Adopted(changed=present != template_of(processor), guessed=guessed)


def _give(processor: Any, template: str) -> None:
    processor.chat_template = processor.tokenizer.chat_template = template


def describe_guess(guessed: str) -> str:
    """For the log: what an `Adopted` that was guessed means."""
    return (
        f"the student has no chat template that takes a question about an image, so that what its family writes around "
        f"one is not known: an image is written as {guessed!r} alone. If that is not meant, save its family's "
        "chat_template.jinja beside it"
    )


def image_place(processor: Any) -> str | None:
    """What the template writes for an image, such as "<|vision_start|><|image_pad|><|vision_end|>"; "" where it writes
    nothing. None where it does not take a question about one, by itself or behind a system turn."""
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
    """How many characters both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _question(parts: tuple[Part, ...]) -> tuple[Turn, ...]:
    return (Turn(role="user", parts=parts), Turn(role="assistant", parts=("b",)))


def check_places_images(processor: Any) -> None:
    """Raises TokenizerMismatchError for a template that writes something else for an image than what this processor
    replaces by vision tokens: that of a teacher of another family, which could not be translated."""
    place = image_place(processor)
    if place is not None and place.count(processor.image_token) != 1:
        raise TokenizerMismatchError(
            f"the teacher's chat template writes {place!r} for an image, and the student's {type(processor).__name__} "
            f"replaces {processor.image_token!r} by vision tokens. "
            + ("It drops images" if not place else "What stands for an image is not written down in it as it comes out")
            + ", so that it cannot be translated: let the teacher's chat_template.jinja write its placeholder, and "
            "make a cache that was made with it again"
        )
