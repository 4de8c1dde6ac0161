"""One sample: its text as the teacher read it, and the likeliest word of each vision token as a grid."""

from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from emkd.storage.cache import Cache
from emkd.storage.record import ImageSpan, Record

# Stands in the text where an image was.
IMAGE_SIGN = "⟦image {number}⟧"


def describe_sample(cache: Cache, key_or_id: str) -> dict[str, Any]:
    """Raises SampleNotFoundError, UsageError (an id of several samples), DamagedCacheError."""
    info = cache.sample_info(cache.find(key_or_id))
    record = cache.record(info.number)
    tokenizer = Tokenizer.from_buffer(cache.tokenizer_json)
    return {
        "sample": info.number,
        "key": info.key,
        "id": info.id,
        "row": info.row,
        "shard": info.shard,
        "tokens": {"text": info.n_text, "vision": info.n_vision, "answer": info.n_answer},
        "retained_mass": info.retained_mass,
        "text": _text(record, tokenizer),
        "answers": [{"said": word, "teacher": best} for word, best in zip(*_answers(record, tokenizer), strict=True)],
        "images": [_image(record, span, tokenizer) for span in record.images],
    }


def _text(record: Record, tokenizer: Tokenizer) -> str:
    """The text tokens decoded, with a sign where each image stood."""
    cuts = [0, *(span.text_position for span in record.images), len(record.text_ids)]
    parts = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        parts.append(tokenizer.decode(record.text_ids[start:stop].tolist(), skip_special_tokens=False))
        if number < len(record.images):
            parts.append(IMAGE_SIGN.format(number=number))
    return " ".join(part for part in parts if part)


def _answers(record: Record, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Each answer token in the data, and the teacher's likeliest token in its place."""
    said = record.text_ids[record.answer_positions]
    return _words(said, tokenizer), _words(record.answer_ids[:, 0], tokenizer)


def _image(record: Record, span: ImageSpan, tokenizer: Tokenizer) -> dict[str, Any]:
    """`words` are rows of a grid for each tile; one row for all tokens where the grid is not known."""
    words = _words(record.vision_ids[span.start : span.start + span.count, 0], tokenizer)
    grids = span.grids or ((1, span.count),)
    tiles, at = [], 0
    for rows, columns in grids:
        tiles.append([words[at + r * columns : at + (r + 1) * columns] for r in range(rows)])
        at += rows * columns
    return {"height": span.original_size[0], "width": span.original_size[1], "grids": grids, "words": tiles}


def _words(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([int(token)], skip_special_tokens=False).strip() or f"#{token}" for token in ids]
