"""All arrays of a cache, kind by kind: encode a record, and decode its fields.

    Record --encode_vision, encode_rest--> {array name: numbers} --decode--> the fields of a Record

`RecordArrays.of(manifest)` picks the form of each kind once; no other code of arrays checks the format version. Vision
tokens are encoded separately because images that several samples share are stored once. All of this is exact except for
the rounding to the cache's precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError
from emkd.storage.arrays.affinity import affinity
from emkd.storage.arrays.codes import CodeFrames, codes
from emkd.storage.arrays.ids import ids
from emkd.storage.arrays.kind import ArrayKind, Arrays
from emkd.storage.arrays.layout import ArrayLayout, TokenAxis
from emkd.storage.arrays.logits import logits, to_keys
from emkd.storage.arrays.positions import answer_positions, text_ids
from emkd.storage.arrays.tails import tail
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.precision import (
    AffinityPrecision,
    LogitsPrecision,
    decode_affinity,
    decode_logits,
    encode_affinity,
    encode_logits,
)
from emkd.storage.record import Record, TopLogits


@dataclass(frozen=True, kw_only=True)
class TopLogitsArrays:
    """The arrays of a `TopLogits` with k logits for each token. tail_mean, codes: None if they are not stored"""

    k: int
    precision: LogitsPrecision
    ids: ArrayKind
    logits: ArrayKind
    tail_logsumexp: ArrayKind
    tail_mean: ArrayKind | None
    codes: CodeFrames | None

    @classmethod
    def of(cls, manifest: Manifest, axis: Literal["vision", "answer"], k: int, *, mean: bool) -> "TopLogitsArrays":
        """Return the arrays of the vision or answer tokens. mean: store tail_mean"""
        return cls(
            k=k,
            precision=manifest.logits_precision,
            ids=ids(axis, k, manifest),
            logits=logits(axis, k, manifest),
            tail_logsumexp=tail("tail_logsumexp", axis, manifest),
            tail_mean=tail("tail_mean", axis, manifest) if mean else None,
            codes=_codes(axis, manifest),
        )

    @property
    def kinds(self) -> tuple[ArrayKind, ...]:
        """The kinds that are stored."""
        optional = (kind for kind in (self.tail_mean, self.codes) if kind is not None)
        return (self.ids, self.logits, self.tail_logsumexp, *optional)

    def encode(self, top: TopLogits) -> Arrays:
        """Return what is stored, by array name. Raises ValueError if a logit does not fit the precision."""
        ids, stored = in_order(top.ids, encode_logits(top.logits, self.precision))
        arrays = self.ids.encode(ids) | self.logits.encode(stored) | self.tail_logsumexp.encode(top.tail_logsumexp)
        if self.tail_mean is not None and top.tail_mean is not None:
            arrays |= self.tail_mean.encode(top.tail_mean)
        if self.codes is not None and top.codes is not None:
            arrays |= self.codes.encode(top.codes)
        return arrays

    def decode(self, arrays: Mapping[str, NDArray[Any]], n: int) -> TopLogits:
        """Return the n tokens that were encoded, with ids and logits [n, k]. They share no memory with `arrays`."""
        logits = np.ascontiguousarray(decode_logits(self.logits.decode(arrays, (n, self.k)), self.precision))
        return TopLogits(
            ids=self.ids.decode(arrays, (n, self.k)),
            logits=_own(logits) if self.precision == "float32" else logits,
            tail_logsumexp=self.tail_logsumexp.decode(arrays, (n,)),
            tail_mean=None if self.tail_mean is None else self.tail_mean.decode(arrays, (n,)),
            codes=None if self.codes is None else self.codes.decode(arrays, (n, sum(self.codes.groups))),
        )


@dataclass(frozen=True, kw_only=True)
class RecordArrays:
    """The arrays of all fields of a record. affinity, text_codes: one of them is None, or text_codes alone"""

    n_ids: int
    affinity_precision: AffinityPrecision
    text_ids: ArrayKind
    text_codes: CodeFrames | None
    vision: TopLogitsArrays
    affinity: ArrayKind | None
    answer_positions: ArrayKind
    answer: TopLogitsArrays

    @classmethod
    def of(cls, manifest: Manifest) -> "RecordArrays":
        """Return the arrays of every shard of a cache."""
        return cls(
            n_ids=manifest.vocabulary_size,
            affinity_precision=manifest.affinity_precision,
            text_ids=text_ids(manifest),
            text_codes=_codes("text", manifest),
            vision=TopLogitsArrays.of(manifest, "vision", manifest.top_k, mean=True),
            affinity=affinity(manifest) if manifest.stores_affinity else None,
            answer_positions=answer_positions(manifest),
            answer=TopLogitsArrays.of(manifest, "answer", manifest.answer_top_k, mean=False),
        )

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        """The layouts of all arrays of a shard."""
        kinds = (
            self.text_ids, self.text_codes, *self.vision.kinds, self.affinity, self.answer_positions,
            *self.answer.kinds,
        )  # fmt: skip
        return tuple(layout for kind in kinds if kind is not None for layout in kind.layouts)

    def encode_vision(self, tokens: TopLogits) -> Arrays:
        """Return what is stored for the vision tokens of one image, by array name.

        Raises ValueError if a logit does not fit the precision.
        """
        return self.vision.encode(tokens)

    def encode_rest(self, record: Record) -> Arrays:
        """Return what is stored for the rest of a record, by array name. Raises as encode_vision, and ValueError if an
        affinity is not a cosine."""
        arrays = self.text_ids.encode(record.text_ids) | self.answer_positions.encode(record.answer_positions)
        if self.affinity is not None and record.affinity is not None:
            arrays |= self.affinity.encode(encode_affinity(record.affinity, self.affinity_precision))
        if self.text_codes is not None and record.text_codes is not None:
            arrays |= self.text_codes.encode(record.text_codes)
        return arrays | self.answer.encode(record.answer)

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Return the array fields of a Record, by name, from what is stored for it, by array name.

        They share no memory with `arrays`.
        """
        n_text, n_vision = len(arrays["text_ids"]), len(arrays["vision_tail_logsumexp"])
        n_answer = len(arrays["answer_positions"])
        n_codes = 0 if self.text_codes is None else sum(self.text_codes.groups)
        found: dict[str, Any] = {
            "text_ids": self.text_ids.decode(arrays, (n_text,)),
            "vision": self.vision.decode(arrays, n_vision),
            "affinity": self._affinity(arrays, (n_text, n_vision)),
            "text_codes": None if self.text_codes is None else self.text_codes.decode(arrays, (n_text, n_codes)),
            "answer_positions": self.answer_positions.decode(arrays, (n_answer,)),
            "answer": self.answer.decode(arrays, n_answer),
        }
        _check_below("text_ids", found["text_ids"], 2**31)  # the embedding may have more rows than the LM head
        _check_below("answer_positions", found["answer_positions"], n_text)
        for name in ("vision", "answer"):
            _check_below(f"{name} ids", found[name].ids, self.n_ids)
        return found

    def _affinity(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, int]) -> NDArray[np.float32] | None:
        if self.affinity is None:
            return None
        found = decode_affinity(self.affinity.decode(arrays, shape), self.affinity_precision)
        return _own(found) if self.affinity_precision == "float32" else found


def _check_below(name: str, numbers: NDArray[np.int32], end: int) -> None:
    """Raise DamagedCacheError unless all numbers are from 0 to `end` - 1: they will be used as positions."""
    # Unsigned, a negative number is larger than any `end`: one pass instead of two, in a loop of every record.
    if numbers.size and np.maximum.reduce(numbers.view(np.uint32), axis=None) >= end:
        raise DamagedCacheError(
            f"{name}: {int(numbers.min())} to {int(numbers.max())}, expected 0 to {end - 1}. {NEXT_STEP}"
        )


def _codes(axis: TokenAxis, manifest: Manifest) -> CodeFrames | None:
    if not manifest.has_codes(axis):
        return None
    if manifest.basis is None:
        raise ValueError("the manifest asks for codes, and its basis is not known yet")
    return codes(axis, manifest.basis)


def group_attributes(manifest: Manifest, shard: int) -> dict[str, Any]:
    """Return the attributes of a shard's Zarr group. They do not name the attempt, so that equal rows give equal
    objects."""
    rows = manifest.rows(shard)
    return {
        "format": "emkd shard",
        "format_version": manifest.format_version,
        "shard": shard,
        "rows": [rows[0], rows[-1] + 1],
        "top_k": manifest.top_k,
        "answer_top_k": manifest.answer_top_k,
        "vocabulary_size": manifest.vocabulary_size,
        "samples": f"offsets and counts of each sample are in index/{shard:06d}.parquet",
    }


def in_order(ids: NDArray[np.int32], stored: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Return the same [n, k] with logits that rounding made equal sorted by ascending id: the order of a record."""
    keys = to_keys(stored)
    tied = (keys[:, :-1] == keys[:, 1:]) & (ids[:, :-1] > ids[:, 1:])
    rows = np.flatnonzero(tied.any(axis=1))
    if not len(rows):
        return ids, stored
    order = np.lexsort((ids[rows], ~keys[rows]), axis=1)
    ids, stored = ids.copy(), stored.copy()
    for array in (ids, stored):
        array[rows] = np.take_along_axis(array[rows], order, axis=1)
    return ids, stored


def _own(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values in their own memory: views may be of a shard's, which is reused for the next shard."""
    return values if values.base is None else values.copy(order="K")
