"""Everything in which a model has to agree with the teacher of a cache before it can use the cache.

    agree_on_tokenizer   what ids mean, how text is cut          from tokenizer.json, before any weights are loaded
    agree                chat template, images, families         from the processor
    agree_on_row         text, answers, images                   row by row, whenever a row is read

Three callers call these functions in this order, so that all of them refuse the same models with the same messages:
`cache-teacher --for-student` before the job, `train-student`, and `inspect --against-teacher`. The last compares a live
model that should be the teacher itself, and is stricter (`Role`). Differences that do not prevent the use of a cache
go to `warn`, the caller's log, as soon as they are found; all others raise an exception.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from emkd.agreement.pictures import check_field_of_view, check_same_spans, image_differences
from emkd.agreement.template import adopt_template, check_places_images, describe_guess
from emkd.agreement.text import Reading, SharedText, Words, check_same_text, shared_text
from emkd.agreement.tokenizer import check_same_ids, check_shared_tokenizer, describe_lacking, lacking_ids
from emkd.samples.encode import Encoded
from emkd.samples.render import end_token
from emkd.storage.manifest.manifest import Manifest
from emkd.vlm.identity import image_processor_settings
from emkd.vlm.loading import check_template
from emkd.vlm.pooling import family_of

# Gets a line for the log.
Warn = Callable[[str], None]


class Role(StrEnum):
    """The role of the model that reads a cache; messages call the model by this name.

    A live model should be the cache's teacher. It must have the teacher's ids and no others, and read each row exactly
    as the teacher did, with its own template. Differences in how it prepares pixels are reported and never refused: the
    comparison of the outputs decides.
    """

    STUDENT = "student"
    LIVE_MODEL = "live model"


@dataclass(frozen=True, kw_only=True)
class TeacherSide:
    """The facts about a cache's teacher with which a reader has to agree.

    chat_template:   None in caches that do not record it
    image_processor: settings as `image_processor_settings` returns them
    model_type:      of its config, such as "llava"
    """

    tokenizer_json: bytes
    chat_template: str | None
    image_processor: dict[str, Any]
    model_type: str

    @classmethod
    def of(cls, manifest: Manifest, tokenizer_json: bytes) -> "TeacherSide":
        """Return the teacher's side of a cache, or of a job that has not written its cache yet."""
        return cls(
            tokenizer_json=tokenizer_json,
            chat_template=manifest.tokenizer.chat_template,
            image_processor=manifest.image_processor.settings,
            model_type=manifest.teacher.architecture,
        )


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The model that is to use a cache. `path` names it in errors; `model_type` is its config's, pooled or not."""

    path: Path
    processor: Any
    model_type: str
    role: Role = Role.STUDENT


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What `agree` found.

    other_family:               whether the two may write different tokens around and within images
    image_processor_differs_in: names of settings
    """

    other_family: bool = False
    image_processor_differs_in: tuple[str, ...] = ()


def agree_on_tokenizer(
    teacher: TeacherSide, tokenizer_json: bytes, role: Role = Role.STUDENT, *, warn: Warn = warnings.warn
) -> None:
    """Compare tokenizers. Raises TokenizerMismatchError.

    A student may lack ids of the teacher's, or have more; a live model may not.
    """
    check_shared_tokenizer(teacher.tokenizer_json, tokenizer_json, role)
    if role is Role.LIVE_MODEL:
        check_same_ids(teacher.tokenizer_json, tokenizer_json, role)
    lacking = lacking_ids(teacher.tokenizer_json, tokenizer_json)
    if lacking:
        warn(describe_lacking(lacking, role))


def agree(
    teacher: TeacherSide | None,
    reader: Reader,
    *,
    has_images: bool,
    distils: bool = True,
    warn: Warn = warnings.warn,
) -> Agreement:
    """Compare everything else that does not depend on a row; give a student's processor the teacher's chat template.

    teacher:    None if there is no cache: then only the student's own chat template is checked
    has_images: whether the cache has vision tokens, so that the template must place images
    distils:    False for a student that trains on labels alone, which may see another part of an image
    warn:       gets a line for each difference that is no obstacle; a live model has none

    Raises GeometryMismatchError if the two see different parts of an image, ModelError if there is no chat template at
    all, TokenizerMismatchError if the template cannot place the student's images.
    """
    if reader.role is Role.LIVE_MODEL:
        return Agreement(image_processor_differs_in=() if teacher is None else _pixels(teacher, reader))
    other_family = False
    pixels: tuple[str, ...] = ()
    if teacher is not None:
        _adopt(teacher, reader, warn)
        families = family_of(teacher.model_type), family_of(reader.model_type)
        other_family = families[0] != families[1]
        if other_family:
            warn(_describe_families(*families))
        if distils:
            check_field_of_view(teacher.image_processor, image_processor_settings(reader.processor))
        pixels = _pixels(teacher, reader)
        if pixels:
            warn(f"student and teacher prepare images differently ({', '.join(pixels)}): they may see different images")
    check_template(reader.path, reader.processor)
    if teacher is not None and has_images:
        check_places_images(reader.processor)
    if end_token(reader.processor) is None:
        warn(NO_END)
    return Agreement(other_family=other_family, image_processor_differs_in=pixels)


def agree_on_row(
    own: Encoded,
    teacher: Reading,
    row: int,
    *,
    words: Words,
    other_family: bool = False,
    role: Role = Role.STUDENT,
) -> SharedText | None:
    """Compare what both read of a row: text, answers, positions of images.

    Returns the text that both read (see `shared_text`), or None if that is the whole text. A live model must also have
    the same vision tokens for each image. Raises TokenizerMismatchError, GeometryMismatchError.

    words: decodes token ids for messages (`Encoder.words`)
    """
    if role is Role.STUDENT:
        return shared_text(own, teacher, row, other_family=other_family, words=words)
    check_same_text(own, teacher, row, words=words, name=role)
    check_same_spans(own.images, teacher.images, row, name=role)
    return None


NO_END = (
    "the chat template writes no end token after answers, so the student will not learn where to stop. If you do not "
    "want that, let the teacher's chat_template.jinja write one after the assistant's turns, and make the cache again"
)


def _adopt(teacher: TeacherSide, reader: Reader, warn: Warn) -> None:
    adopted = adopt_template(reader.processor, teacher.chat_template)
    if adopted.changed:
        warn(
            "the student's chat template is missing or differs from the teacher's: "
            "it is trained and saved with the teacher's"
        )
    if adopted.guessed is not None:
        warn(describe_guess(adopted.guessed))


def _describe_families(teacher: str, student: str) -> str:
    return (
        f"the teacher is a {teacher}, the student a {student}: tokens that only one of them writes around and within "
        "images are left out of the affinities that VLAD compares"
    )


def _pixels(teacher: TeacherSide, reader: Reader) -> tuple[str, ...]:
    return tuple(image_differences(teacher.image_processor, image_processor_settings(reader.processor)))
