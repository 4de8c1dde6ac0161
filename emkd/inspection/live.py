"""A live teacher for a cache: loaded as the cache says, and rows of the data as it reads them now.

What has to be so before a number can be compared is checked here: the tokenizer, the content of each row, its tokens
and its images. What may differ and then explains differing numbers is told (`likeness`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from emkd.errors import DataMismatchError, SampleError, TeacherMismatchError, TokenizerMismatchError
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.pipeline.out_of_memory import rows_that_fit
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded
from emkd.storage.cache import Cache
from emkd.storage.record import Record
from emkd.trainer.data.selection import Selection
from emkd.vlm.identity import image_differences, image_processor_settings, sha256_of, tokenizer_json, weights_sha256
from emkd.vlm.loading import load, resolve


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """The arguments of `emkd inspect --against-teacher`, by the same names.

    attn_implementation: None for what the cache was made with
    """

    against_teacher: str
    data: str
    image_root: Path | None = None
    samples: int = 8
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def load_teacher(cache: Cache, settings: LiveSettings) -> Teacher:
    """In the cache's dtype and with its settings, on the GPU where there is one. Raises InputNotFoundError, ModelError,
    TokenizerMismatchError."""
    manifest = cache.manifest
    path = resolve(settings.against_teacher, settings.revision)
    _check_tokenizer(settings.against_teacher, cache, tokenizer_json(path))
    vlm = load(
        str(path),
        dtype=manifest.teacher.dtype,
        attn_implementation=settings.attn_implementation or manifest.teacher.attn_implementation,
        device="cuda" if torch.cuda.is_available() else "cpu",
        trust_remote_code=settings.trust_remote_code,
    )
    if vlm.n_tokens != manifest.vocabulary_size:
        raise TokenizerMismatchError(
            f"{settings.against_teacher} has {vlm.n_tokens} ids, the cache's teacher had {manifest.vocabulary_size}: "
            f"their logits cannot be compared. The cache was made by {made_by(cache)}: name that one"
        )
    return Teacher(vlm, CaptureSettings.of(manifest))


def _check_tokenizer(name: str, cache: Cache, found: bytes) -> None:
    """Every id has to mean the same token, or logits of the same id are of different things."""
    ours: dict[str, int] = Tokenizer.from_buffer(found).get_vocab()  # type: ignore[arg-type, unused-ignore]
    theirs: dict[str, int] = Tokenizer.from_buffer(cache.tokenizer_json).get_vocab()  # type: ignore[arg-type, unused-ignore]
    differing = sorted({token_id for _, token_id in ours.items() ^ theirs.items()})
    if differing:
        first = differing[0]
        here, cached = (next((t for t, i in known.items() if i == first), None) for known in (ours, theirs))
        raise TokenizerMismatchError(
            f"the tokenizer of {name} is not that of the cache's teacher: {len(differing)} ids differ, the first is id "
            f"{first}: here {here!r}, cached {cached!r}. The cache was made by {made_by(cache)}: name that one"
        )


def made_by(cache: Cache) -> str:
    """The teacher that made the cache, in words."""
    teacher = cache.manifest.teacher
    revision = "" if teacher.revision is None else f", revision {teacher.revision}"
    attention = "" if teacher.attn_implementation is None else f", {teacher.attn_implementation} attention"
    weights = f"weights {teacher.weights_sha256[:12]}"
    return f"{teacher.name} ({weights}{revision}, {teacher.dtype}{attention})"


def likeness(cache: Cache, teacher: Teacher) -> dict[str, Any]:
    """Whether files and settings are those that the cache was made with; none of it decides, numbers do.

    same: {weights, tokenizer, chat_template: bool};  image_processor_differs_in: names of settings
    """
    manifest, processor = cache.manifest, teacher.vlm.processor
    pixels = image_differences(manifest.image_processor.settings, image_processor_settings(processor))
    tokenizer = sha256_of(json.loads(tokenizer_json(teacher.vlm.path)))
    template = manifest.tokenizer.chat_template_sha256
    same = {
        "weights": weights_sha256(teacher.vlm.path) == manifest.teacher.weights_sha256,
        "tokenizer": tokenizer == manifest.tokenizer.sha256,
        "chat_template": template is None or template == sha256_of(processor.chat_template),
    }
    return {"same": same, "image_processor_differs_in": pixels}


def pick(cache: Cache, selection: Selection, wanted: int) -> list[tuple[int, int]]:
    """(sample number, row) of at most `wanted` samples, evenly spread, in the order of the cache.

    Samples with images come first, since those without have nothing but answers to compare: text-only ones are taken
    only where there are not enough of the others.
    """
    numbers, first = np.unique(selection.numbers, return_index=True)
    rows = selection.rows[first]
    seeing = cache.samples["vision_count"].to_numpy()[numbers] > 0
    chosen = _evenly(np.flatnonzero(seeing), wanted)
    chosen = np.concatenate([chosen, _evenly(np.flatnonzero(~seeing), wanted - len(chosen))])
    return [(int(numbers[place]), int(rows[place])) for place in np.sort(chosen)]


def _evenly(places: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    n = min(wanted, len(places))
    return places[[len(places) * i // n for i in range(n)]]


def read(teacher: Teacher, dataset: Dataset, row: int, record: Record) -> Encoded:
    """The row as this teacher reads it, which has to be what the record is of.

    Raises SampleError, DataMismatchError (another content), TeacherMismatchError (other tokens or images).
    """
    try:
        with rows_that_fit():
            sample = dataset.sample(row)
            encoded = None if sample.key != record.key else teacher.encoder(sample)
    except SampleError as error:
        detail = f"row {row} of {dataset.data} is in the cache, and cannot be used now: {error.detail}"
        raise SampleError(error.reason, detail) from error
    if encoded is None:
        raise DataMismatchError(
            f"row {row} (id {sample.id!r}) of {dataset.data} is not what the teacher saw: its key is "
            f"{sample.key[:12]}, the cache has {record.key[:12]}. Give the data that the cache was made from"
        )
    _check_same_tokens(encoded, record, row, teacher)
    return encoded


def _check_same_tokens(live: Encoded, stored: Record, row: int, teacher: Teacher) -> None:
    ours, theirs = live.text_ids.tolist(), stored.text_ids.tolist()
    if ours != theirs:
        same = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        here, cached = (teacher.encoder.words(ids[same : same + 1]) or "nothing" for ids in (ours, theirs))
        raise TeacherMismatchError(
            f"row {row}: this teacher reads {len(ours)} text tokens, the cache has {len(theirs)}; the first that "
            f"differs is text token {same}: here {here!r}, cached {cached!r}. Its tokenizer or chat template is not "
            "the cache's: name the teacher that made the cache, or make the cache anew"
        )
    if live.answer_positions.tolist() != stored.answer_positions.tolist():
        raise TeacherMismatchError(
            f"row {row}: {len(live.answer_positions)} text tokens are answers here, {len(stored.answer_positions)} in "
            "the cache, or other ones: the chat template marks answers differently. Name the teacher that made the "
            "cache, or make the cache anew"
        )
    spans = [[(i.text_position, i.start, i.count) for i in images] for images in (live.images, stored.images)]
    if spans[0] != spans[1]:
        here, cached = (", ".join(f"{count} at text token {at}" for at, _, count in span) for span in spans)
        raise TeacherMismatchError(
            f"row {row}: vision tokens of its images are {here} here, and {cached} in the cache: the image processor "
            "or the model's size of pictures is another one. Name the teacher that made the cache, or make it anew"
        )
