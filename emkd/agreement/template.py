"""The teacher's chat template becomes the student's: both read the same text; each has its own image tokens."""

from dataclasses import dataclass
from typing import Any

from emkd.errors import TokenizerMismatchError
from emkd.samples.render import template_of
from emkd.samples.template import image_text


@dataclass(frozen=True)
class Adopted:
    """What `adopt_template` did to a student's chat template.

    changed: whether the student had another template, or none
    guessed: what the template now writes for an image if the student had no template to show how its family writes
             one: the placeholder alone. None if that is known
    """

    changed: bool
    guessed: str | None = None


def adopt_template(processor: Any, template: str | None) -> Adopted:
    """Give a student's processor the teacher's chat template.

    What the template writes for an image is replaced by what the student's family writes for one, if the two differ.
    The processor and its tokenizer share one template file, so both get the template; from then on, the student renders
    with it and is saved with it. Call this before you make an `Encoder`, which keeps what it rendered. For a cache that
    does not record its teacher's template (None), the processor stays unchanged.
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
    """Return the line for the log about an `Adopted` with a guess."""
    return (
        "the student has no chat template that takes a question about an image, so what its family writes around an "
        f"image is not known: emkd writes an image as {guessed!r} alone. If you do not want that, save the family's "
        "chat_template.jinja in the student's folder"
    )


def check_places_images(processor: Any) -> None:
    """Check that the template writes for an image what this processor replaces by vision tokens.

    Raises TokenizerMismatchError if it writes something else: the template of a teacher of another family, which
    `adopt_template` could not replace.
    """
    written = image_text(processor)
    if written is not None and written.count(processor.image_token) != 1:
        why = "It drops images" if not written else "The template does not contain that text literally"
        raise TokenizerMismatchError(
            f"the teacher's chat template writes {written!r} for an image, and the student's "
            f"{type(processor).__name__} replaces {processor.image_token!r} by vision tokens. {why}, so emkd cannot "
            "replace it. Let the teacher's chat_template.jinja write its placeholder, and make the cache again with "
            "that template"
        )
