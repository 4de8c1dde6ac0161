"""From a record to what is stored of it, and back.

    Record --encode_vision, encode_rest--> {array name: numbers} --decode--> the fields of a Record

Rearranged or as they are, by what the manifest says. Vision tokens are encoded image by image, because images that
several samples share are stored once. All of this is exact but for the rounding that the precision asks for.

Shape legend: n tokens, k stored logits of each, L text and Nt vision tokens of a sample
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emkd.storage.arrays.rearrange import (
    LOW_BITS,
    along_tokens,
    by_rank,
    from_keys,
    from_ranks,
    from_tokens,
    join_ids,
    split_ids,
    to_keys,
)
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.precision import decode_affinity, decode_logits, encode_affinity, encode_logits, logits_dtype
from emkd.storage.record import Record

Arrays = dict[str, NDArray[Any]]


def encode_vision(record: Record, manifest: Manifest) -> Arrays:
    """All vision tokens of a record, by array name. ValueError for values that do not fit the precision."""
    return {
        **_encode_tokens("vision", record.vision_ids, record.vision_logits, manifest),
        "vision_tail_logsumexp": record.vision_tail_logsumexp,
        "vision_tail_mean": record.vision_tail_mean,
    }


def encode_rest(record: Record, manifest: Manifest) -> Arrays:
    """What is stored of a record besides its vision tokens, by array name. ValueError as encode_vision."""
    return {
        "text_ids": record.text_ids,
        "affinity": _encode_affinity(record.affinity, manifest),
        "answer_positions": record.answer_positions,
        **_encode_tokens("answer", record.answer_ids, record.answer_logits, manifest),
        "answer_tail_logsumexp": record.answer_tail_logsumexp,
    }


def decode(arrays: Arrays, manifest: Manifest) -> Arrays:
    """The array fields of a Record from what is stored of it. They share no memory with `arrays`."""
    n_text, n_vision = len(arrays["text_ids"]), len(arrays["vision_tail_logsumexp"])
    plain = ("text_ids", "vision_tail_logsumexp", "vision_tail_mean", "answer_positions", "answer_tail_logsumexp")
    vision_ids, vision_logits = _decode_tokens("vision", arrays, manifest)
    answer_ids, answer_logits = _decode_tokens("answer", arrays, manifest)
    return {
        **{name: arrays[name].copy() for name in plain},
        "vision_ids": vision_ids,
        "vision_logits": vision_logits,
        "answer_ids": answer_ids,
        "answer_logits": answer_logits,
        "affinity": _decode_affinity(arrays["affinity"], n_text, n_vision, manifest),
    }


def _encode_tokens(kind: str, ids: NDArray[np.int32], logits: NDArray[np.float32], manifest: Manifest) -> Arrays:
    """ids and logits [n, k] of one kind of tokens."""
    stored = encode_logits(logits, manifest.logits_precision)
    ids, keys, stored = _ranked(ids, to_keys(stored), stored)
    return {f"{kind}_logits": by_rank(keys) if manifest.rearranged else stored} | _encode_ids(kind, ids, manifest)


def _encode_ids(kind: str, ids: NDArray[np.int32], manifest: Manifest) -> Arrays:
    if not manifest.splits_ids:
        return {f"{kind}_ids": ids}
    low, high = split_ids(ids)
    wide = manifest.vocabulary_size > 1 << LOW_BITS
    return {f"{kind}_ids_low": low} | ({f"{kind}_ids_high": high} if wide else {})


def _decode_tokens(
    kind: str, arrays: Mapping[str, NDArray[Any]], manifest: Manifest
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    precision, stored = manifest.logits_precision, arrays[f"{kind}_logits"]
    if manifest.rearranged:
        keys = from_ranks(stored)
        logits = np.ascontiguousarray(decode_logits(from_keys(keys, logits_dtype(precision)), precision).T)
    else:
        logits = decode_logits(stored, precision)
        logits = logits.copy() if precision == "float32" else logits
    if manifest.splits_ids:
        return join_ids(arrays[f"{kind}_ids_low"], arrays.get(f"{kind}_ids_high")), logits
    return arrays[f"{kind}_ids"].copy(), logits


def _ranked(
    ids: NDArray[np.int32], keys: NDArray[Any], stored: NDArray[Any]
) -> tuple[NDArray[np.int32], NDArray[Any], NDArray[Any]]:
    """The same [n, k], with rows in which rounding made ties ordered again by id."""
    tied = (keys[:, :-1] == keys[:, 1:]) & (ids[:, :-1] > ids[:, 1:])
    rows = np.flatnonzero(tied.any(axis=1))
    if not len(rows):
        return ids, keys, stored
    order = np.lexsort((ids[rows], ~keys[rows]), axis=1)
    ids, keys, stored = ids.copy(), keys.copy(), stored.copy()
    for array in (ids, keys, stored):
        array[rows] = np.take_along_axis(array[rows], order, axis=1)
    return ids, keys, stored


def _encode_affinity(affinity: NDArray[np.float32], manifest: Manifest) -> NDArray[Any]:
    """[L, Nt] as the numbers of one axis."""
    stored = encode_affinity(affinity, manifest.affinity_precision)
    if not manifest.rearranged:
        return stored.reshape(-1)
    by_vision = np.ascontiguousarray(stored.T)
    return (along_tokens(by_vision) if manifest.affinity_precision == "int8" else by_vision).reshape(-1)


def _decode_affinity(flat: NDArray[Any], n_text: int, n_vision: int, manifest: Manifest) -> NDArray[np.float32]:
    precision = manifest.affinity_precision
    if not manifest.rearranged:
        found = decode_affinity(flat.reshape(n_text, n_vision), precision)
    else:
        by_vision = flat.reshape(n_vision, n_text)
        if precision == "int8":
            by_vision = from_tokens(by_vision)
        found = decode_affinity(by_vision, precision).T
    return found.copy(order="K") if precision == "float32" else found
