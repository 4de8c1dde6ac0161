"""One sample: its text as the teacher read it, the likeliest word of each vision token, and the affinity."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from emkd.inspection.report.heatmap import (
    MAX_COLUMNS,
    answer_grids,
    bin_columns,
    bounds,
    choose_rows,
    columns_each,
    split_tiles,
)
from emkd.inspection.report.listing import find_by_name_or_number, text_of, tokenizer_of
from emkd.storage.cache import Cache
from emkd.storage.record import ImageSpan, Record

DECIMALS = 3  # of an affinity; int8 resolves 0.008


def describe_sample(cache: Cache, key_or_id: str) -> dict[str, Any]:
    """Return text, answers, and for each image its `words` (rows of a grid for each tile) and its `affinity`:

        range:             [smallest, largest] cosine of any text token and any vision token of the image
        n_tokens:          vision tokens of the image
        n_columns:         columns of `rows`, at most 64
        tokens_per_column: neighbouring vision tokens whose mean is one value (the last column may have fewer)
        rows:              {position, token, answer, values} of at most 40 text tokens in order: if there are more, the
                           answer's tokens and others evenly between them (see `choose_rows`)
        answer_grid:       for each tile its rows of the mean over all answer tokens, columns binned as above; empty if
                           the tiles' grids are not known

    `affinity` is None if a sample has no text or an image no tokens. Values have 3 decimals.

    Raises SampleNotFoundError, UsageError (several samples have that id), DamagedCacheError.
    """
    info = cache.sample_info(find_by_name_or_number(cache, key_or_id))
    record = cache.record(info.number)
    tokenizer = tokenizer_of(cache)
    affinity = cache.affinity(record)
    return {
        "sample": info.number,
        "key": info.key,
        "id": info.id,
        "row": info.row,
        "shard": info.shard,
        "tokens": {"text": info.n_text, "vision": info.n_vision, "answer": info.n_answer},
        "retained_mass": info.retained_mass,
        "text": text_of(record, tokenizer),
        "answers": [{"said": word, "teacher": best} for word, best in zip(*_answers(record, tokenizer), strict=True)],
        "images": [
            {**_image(record, span, tokenizer), "affinity": _affinity(affinity, record, span, tokenizer)}
            for span in record.images
        ],
    }


def _answers(record: Record, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Each answer token in the data, and the teacher's likeliest token at its position."""
    said = record.text_ids[record.answer_positions]
    return _words(said, tokenizer), _words(record.answer.ids[:, 0], tokenizer)


def _image(record: Record, span: ImageSpan, tokenizer: Tokenizer) -> dict[str, Any]:
    """`words` are rows of a grid for each tile; one row of all tokens if the grid is not known."""
    words = _words(record.vision.ids[span.start : span.start + span.count, 0], tokenizer)
    known = span.grids and split_tiles(span.count, span.grids)
    grids = span.grids if known else ((1, span.count),)
    tiles = [
        [words[tile][r * columns : (r + 1) * columns] for r in range(rows)]
        for tile, (rows, columns) in split_tiles(span.count, grids)
    ]
    return {"height": span.original_size[0], "width": span.original_size[1], "grids": grids, "words": tiles}


def _affinity(
    whole: NDArray[np.float32], record: Record, span: ImageSpan, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """The numbers of one image's heat map, as `describe_sample` documents them. whole: [L, Nt] of all images"""
    affinity = whole[:, span.start : span.start + span.count]
    if affinity.size == 0:
        return None
    answers = record.answer_positions.tolist()
    positions = choose_rows(len(affinity), answers)
    words = _words(record.text_ids[positions], tokenizer)
    values, counts = bin_columns(affinity[positions], np.ones(span.count), MAX_COLUMNS)
    return {
        "range": _rounded(np.array([bounds([affinity])]))[0],
        "n_tokens": span.count,
        "n_columns": len(counts),
        "tokens_per_column": columns_each(span.count, MAX_COLUMNS),
        "rows": [
            {"position": position, "token": word, "answer": position in answers, "values": row}
            for position, word, row in zip(positions, words, _rounded(values), strict=True)
        ],
        "answer_grid": [_rounded(tile) for tile in answer_grids(affinity, answers, span.grids)],
    }


def _rounded(values: np.ndarray) -> list[list[float]]:
    """Rows of plain numbers that are short in JSON; adding 0 turns -0.0 into 0."""
    return [[round(value, DECIMALS) + 0.0 for value in row] for row in values.tolist()]


def _words(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([int(token)], skip_special_tokens=False).strip() or f"#{token}" for token in ids]
