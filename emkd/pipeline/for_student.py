"""`--for-student`: before the teacher runs, check that a student will be able to use the cache.

A training run would find the same obstacles after weeks of GPU time. Here emkd compares everything that
`emkd.agreement` lists, with a few rows of the data. It loads no weights.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from emkd.agreement.agree import Reader, TeacherSide, agree, agree_on_row, agree_on_tokenizer
from emkd.errors import ModelError, SampleError, UsageError
from emkd.pipeline.progress import log
from emkd.pipeline.settings import JobSettings
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded, Encoder
from emkd.samples.sample import Sample
from emkd.storage.manifest.manifest import Manifest
from emkd.vlm.identity import tokenizer_json
from emkd.vlm.loading import load_processor, resolve

ROWS = 32


def check_student(settings: JobSettings, run: Manifest, teacher_tokenizer: bytes, dataset: Dataset) -> None:
    """Check that `settings.for_student` can use the cache of `run`; log the differences that do not prevent it.

    Raises TokenizerMismatchError, GeometryMismatchError, ModelError or UsageError if it cannot.
    """
    assert settings.for_student is not None  # the caller's condition
    path, trusted = resolve(settings.for_student), settings.trust_remote_code
    teacher = TeacherSide.of(run, teacher_tokenizer)
    agree_on_tokenizer(teacher, tokenizer_json(path), warn=log)
    processor = load_processor(path, trusted, needs_template=False)
    model_type = AutoConfig.from_pretrained(path, trust_remote_code=trusted).model_type
    rows = _chosen(run.plan.n_rows)
    read_by_teacher = _read_by_teacher(settings, run, dataset, rows)
    has_images = any(theirs.images for _, theirs in read_by_teacher.values())
    reader = Reader(path=path, processor=processor, model_type=model_type)
    agreement = agree(teacher, reader, has_images=has_images, warn=log)
    clock = run.clock or settings.clock
    student = _encoder(settings, path, processor, None, clock)
    refused = []
    for row, (sample, theirs) in read_by_teacher.items():
        try:
            ours = student(sample)
        except SampleError as error:
            refused.append(f"row {row}: {error}")
            continue
        agree_on_row(ours, theirs, row, words=student.words, other_family=agreement.other_family)
    if refused:
        raise UsageError(
            f"--for-student {settings.for_student} cannot read {len(refused)} of {len(rows)} checked rows that the "
            f"teacher can read: {refused[0]}"
        )
    if not read_by_teacher:
        raise UsageError(f"--for-student: the teacher can read none of the {len(rows)} checked rows")
    log(
        f"{settings.for_student} can use this cache: it reads all of {len(read_by_teacher)} rows, drawn from "
        f"{run.plan.n_rows}, as the teacher does"
    )


def _chosen(n_rows: int) -> Sequence[int]:
    """At random: evenly spaced rows of data that alternate between sources might all come from one source."""
    return sorted(random.Random(0).sample(range(n_rows), min(ROWS, n_rows)))


def _read_by_teacher(
    settings: JobSettings, run: Manifest, dataset: Dataset, rows: Sequence[int]
) -> dict[int, tuple[Sample, Encoded]]:
    """Rows, and how the teacher reads them, without pixels. Leaves out rows that it cannot read: the job skips them."""
    path = resolve(settings.teacher, settings.revision)
    processor = load_processor(path, settings.trust_remote_code)
    teacher = _encoder(settings, path, processor, run.max_length, run.clock or settings.clock)
    found = {}
    for row in rows:
        with suppress(SampleError):
            sample = dataset.sample(row)
            found[row] = sample, replace(teacher(sample), inputs={})
    return found


def _encoder(settings: JobSettings, path: Path, processor: Any, max_length: int | None, clock: str | None) -> Encoder:
    """Return an encoder. A model without its own limit reads up to the length that its language model was made for."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise ModelError(f"{path}: its config names no image_token_id; models of type {config.model_type!r}")
    limit = max_length or getattr(config.get_text_config(), "max_position_embeddings", None)
    return Encoder(processor, int(token), limit, clock)
