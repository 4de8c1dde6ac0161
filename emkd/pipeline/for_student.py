"""`--for-student`: check before the teacher runs that a student will be able to use the cache.

A training run would find out only after weeks of GPU time. Here a few rows show it: the tokenizer, the text and the
answers that the student makes with the teacher's chat template, which part of an image it sees, and how it prepares
images. Loads no weights.
"""

import random
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from emkd.agreement.text import shared_text
from emkd.errors import ModelError, SampleError, UsageError
from emkd.pipeline.progress import log
from emkd.pipeline.settings import JobSettings
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.samples.template import adopt_template, check_places_images, describe_guess
from emkd.storage.manifest.manifest import Manifest
from emkd.vlm.identity import (
    check_field_of_view,
    check_shared_tokenizer,
    describe_lacking,
    image_differences,
    image_processor_settings,
    lacking_ids,
    tokenizer_json,
)
from emkd.vlm.loading import load_processor, resolve
from emkd.vlm.pooling import family_of

ROWS = 32


def check_student(settings: JobSettings, run: Manifest, teacher_tokenizer: bytes, dataset: Dataset) -> None:
    """Check that `settings.for_student` can use the cache of `run`; log differences that are no obstacle.

    Raises TokenizerMismatchError, GeometryMismatchError, ModelError or UsageError if it cannot.
    """
    assert settings.for_student is not None  # the caller's condition
    path = resolve(settings.for_student)
    student_tokenizer = tokenizer_json(path)
    check_shared_tokenizer(teacher_tokenizer, student_tokenizer)
    lacking = lacking_ids(teacher_tokenizer, student_tokenizer)
    if lacking:
        log(describe_lacking(lacking))
    template = run.tokenizer.chat_template
    processor = load_processor(path, settings.trust_remote_code, needs_template=template is None)
    check_field_of_view(run.image_processor.settings, image_processor_settings(processor))
    differing = image_differences(run.image_processor.settings, image_processor_settings(processor))
    if differing:
        log(f"{settings.for_student} and the teacher prepare images differently: {', '.join(differing)}")
    adopted = adopt_template(processor, template)
    if adopted.changed:
        log(f"{settings.for_student} does not have the teacher's chat template: it will be trained with the teacher's")
    if adopted.guessed is not None:
        log(describe_guess(adopted.guessed))
    student = _encoder(settings, path, processor, None)
    path = resolve(settings.teacher, settings.revision)
    teacher = _encoder(settings, path, load_processor(path, settings.trust_remote_code), run.max_length)
    own_type = AutoConfig.from_pretrained(
        resolve(settings.for_student), trust_remote_code=settings.trust_remote_code
    ).model_type
    other = family_of(own_type) != family_of(run.teacher.architecture)
    compared, refused = 0, []
    n_chosen = min(ROWS, run.plan.n_rows)
    # Not evenly spread: of data that are interleaved from several sets, that would check some sets alone.
    for row in sorted(random.Random(0).sample(range(run.plan.n_rows), n_chosen)):
        try:
            sample = dataset.sample(row)
            theirs = teacher(sample)
        except SampleError:
            continue  # the job skips the row, whichever student it is for
        if theirs.images:
            check_places_images(processor)
        try:
            ours = student(sample)
        except SampleError as error:
            refused.append(f"row {row}: {error}")
            continue
        shared_text(ours, theirs, row, other_family=other, words=student.words)
        compared += 1
    if refused:
        raise UsageError(
            f"--for-student {settings.for_student} cannot read {len(refused)} of the {n_chosen} rows checked that the "
            f"teacher can read: {refused[0]}"
        )
    if not compared:
        raise UsageError(f"--for-student: the teacher cannot read any of the {n_chosen} rows checked")
    log(
        f"{settings.for_student} can use this cache: it reads all of {compared} rows, drawn from {run.plan.n_rows}, as "
        "the teacher does"
    )


def _encoder(settings: JobSettings, path: Path, processor: Any, max_length: int | None) -> Encoder:
    """An encoder for one of the two models. Without `max_length`, its limit is that of its language model."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise ModelError(f"{path}: its config names no image_token_id; models of type {config.model_type!r}")
    limit = max_length or getattr(config.get_text_config(), "max_position_embeddings", None)
    return Encoder(processor, int(token), limit)
