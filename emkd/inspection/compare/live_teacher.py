"""A live teacher for a cache, loaded with the cache's settings, and rows of the data as it reads them now.

Before any number is compared, this module checks what must be equal (`emkd.agreement`): the tokenizer, the content of
each row, its tokens and its images. `likeness` reports what may differ and would explain different numbers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emkd.agreement.agree import Reader, Role, TeacherSide, agree, agree_on_row, agree_on_tokenizer
from emkd.clock import clock_of_cache
from emkd.errors import (
    DataMismatchError,
    GeometryMismatchError,
    SampleError,
    TeacherMismatchError,
    TokenizerMismatchError,
)
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.pipeline.out_of_memory import rows_that_fit
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded
from emkd.samples.render import template_of
from emkd.storage.cache import Cache
from emkd.storage.record import Record
from emkd.trainer.data.selection import Selection
from emkd.vlm.codes import Codes
from emkd.vlm.forward import full_float32
from emkd.vlm.identity import sha256_of, tokenizer_json, weights_sha256
from emkd.vlm.loading import load, resolve


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """The arguments of `emkd inspect --against-teacher`, by the same names.

    follow_links:        links inside the image root may lead out of it
    attn_implementation: None for the implementation that the cache was made with
    clock: the date that the chat template writes, if it writes one and the cache does not keep it
    """

    against_teacher: str
    data: str
    image_root: Path | None = None
    follow_links: bool = False
    samples: int = 8
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    clock: str | None = None


def load_teacher(cache: Cache, settings: LiveSettings) -> Teacher:
    """Load the teacher in the cache's dtype and with its settings, on the GPU if there is one.

    Raises InputNotFoundError, ModelError, TokenizerMismatchError.
    """
    manifest = cache.manifest
    path = resolve(settings.against_teacher, settings.revision)
    try:
        agree_on_tokenizer(_teacher_side(cache), tokenizer_json(path), Role.LIVE_MODEL)
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(f"{settings.against_teacher}: {error}. {_name_the_teacher(cache)}") from error
    full_float32()
    vlm = load(
        str(path),
        dtype=manifest.teacher.dtype,
        attn_implementation=settings.attn_implementation or manifest.teacher.attn_implementation,
        device="cuda" if torch.cuda.is_available() else "cpu",
        trust_remote_code=settings.trust_remote_code,
    )
    if manifest.vocabulary_size == len(vlm.processor.tokenizer):
        vlm.n_tokens = manifest.vocabulary_size  # of an older cache, a tokenizer's ids beyond a gap are left out
    if vlm.n_tokens != manifest.vocabulary_size:
        raise TokenizerMismatchError(
            f"{settings.against_teacher} has {vlm.n_tokens} ids, the cache's teacher had {manifest.vocabulary_size}, "
            f"so their logits cannot be compared. {_name_the_teacher(cache)}"
        )
    basis = cache.basis
    clock = clock_of_cache(str(cache.files.root), template_of(vlm.processor), manifest.clock, settings.clock)
    return Teacher(vlm, CaptureSettings.of(manifest, clock), None if basis is None else Codes(basis, vlm.device))


def _teacher_side(cache: Cache) -> TeacherSide:
    return TeacherSide.of(cache.manifest, cache.tokenizer_json)


def _name_the_teacher(cache: Cache) -> str:
    return f"The cache was made by {made_by(cache)}: name that teacher"


def made_by(cache: Cache) -> str:
    """Describe the teacher that made the cache."""
    teacher = cache.manifest.teacher
    revision = "" if teacher.revision is None else f", revision {teacher.revision}"
    attention = "" if teacher.attn_implementation is None else f", {teacher.attn_implementation} attention"
    weights = f"weights {teacher.weights_sha256[:12]}"
    return f"{teacher.name} ({weights}{revision}, {teacher.dtype}{attention})"


def likeness(cache: Cache, teacher: Teacher) -> dict[str, Any]:
    """Return whether files and settings are those of the cache. This is only reported: the comparison of the outputs
    decides.

    same: {weights, tokenizer, chat_template: bool};  image_processor_differs_in: names of settings
    """
    manifest, processor = cache.manifest, teacher.vlm.processor
    model_type = teacher.vlm.model.config.model_type
    reader = Reader(path=teacher.vlm.path, processor=processor, model_type=model_type, role=Role.LIVE_MODEL)
    agreement = agree(_teacher_side(cache), reader, has_images=cache.totals.vision_tokens > 0)
    tokenizer = sha256_of(json.loads(tokenizer_json(teacher.vlm.path)))
    template = manifest.tokenizer.chat_template_sha256
    same = {
        "weights": weights_sha256(teacher.vlm.path) == manifest.teacher.weights_sha256,
        "tokenizer": tokenizer == manifest.tokenizer.sha256,
        "chat_template": template is None or template == sha256_of(processor.chat_template),
    }
    return {"same": same, "image_processor_differs_in": list(agreement.image_processor_differs_in)}


def pick(cache: Cache, selection: Selection, wanted: int) -> list[tuple[int, int]]:
    """Return (sample number, row) of at most `wanted` samples, evenly spread, in the order of the cache.

    Text-only samples are taken only if there are not enough samples with images: they have nothing but answers to
    compare.
    """
    numbers, first = np.unique(selection.numbers, return_index=True)
    rows = selection.rows[first]
    seeing = cache.samples["vision_count"].to_numpy()[numbers] > 0
    chosen = _evenly(np.flatnonzero(seeing), wanted)
    chosen = np.concatenate([chosen, _evenly(np.flatnonzero(~seeing), wanted - len(chosen))])
    return [(int(numbers[n]), int(rows[n])) for n in np.sort(chosen)]


def _evenly(numbers: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    n = min(wanted, len(numbers))
    return numbers[[len(numbers) * i // n for i in range(n)]]


def read(teacher: Teacher, dataset: Dataset, row: int, record: Record) -> Encoded:
    """Return the row as this teacher reads it; it must be the row that the record was made from.

    Raises SampleError, DataMismatchError (other content), TeacherMismatchError (other tokens or images).
    """
    try:
        with rows_that_fit():
            sample = dataset.sample(row)
            encoded = None if sample.key != record.key else teacher.encoder(sample)
    except SampleError as error:
        detail = f"row {row} of {dataset.data} is in the cache, but cannot be used now: {error.detail}"
        raise SampleError(error.reason, detail) from error
    if encoded is None:
        raise DataMismatchError(
            f"row {row} (id {sample.id!r}) of {dataset.data} is not what the teacher saw: its key is "
            f"{sample.key[:12]}, the cache has {record.key[:12]}. Give the data that the cache was made from"
        )
    try:
        agree_on_row(encoded, record, row, words=teacher.encoder.words, role=Role.LIVE_MODEL)
    except (TokenizerMismatchError, GeometryMismatchError) as error:
        raise TeacherMismatchError(f"{error}. Name the teacher that made the cache, or make the cache again") from error
    return encoded
