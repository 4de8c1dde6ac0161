"""The arrays of a shard: names, shapes, types, chunks, codecs.

Shape legend: n_text, n_vision, n_answer are the tokens of all the shard's samples together (vision tokens that several
samples share are there once), n_pairs is the sum of L * Nt over the samples; k, k' and the rest as in `record`.

    text_ids                [n_text]        int32
    vision_ids_low          [n_vision, k]   uint16: the lower 16 bits
    vision_ids_high         [n_vision, k]   uint8: what is above them; only where V > 65,536
    vision_logits           [k, n_vision]   uint16 or uint32: keys, rank by rank (see `rearrange`)
    vision_tail_logsumexp   [n_vision]      float32
    vision_tail_mean        [n_vision]      float32
    affinity                [n_pairs]       int8, float16 or float32; each sample's [Nt, L], row by row
    answer_positions        [n_answer]      int32
    answer_ids_low, answer_ids_high, answer_logits as for vision tokens, with k'
    answer_tail_logsumexp   [n_answer]      float32

With lz4, and in format version 1, logits and affinity are not rearranged, and instead there are

    vision_logits, answer_logits  [n, k]     uint16 (bfloat16), float16, float32 or int16 (multiples of a step)
    affinity                      [n_pairs]  each sample's [L, Nt], row by row

In format version 1, and with lz4 in version 2, ids are in one array:

    vision_ids, answer_ids        [n, k]     int32

Chunks hold 16,384 tokens of a two-dimensional array (smaller ones read slower, larger ones cost memory) and 4 MiB of
a one-dimensional one, or the whole array if it is smaller. Only codecs of the Zarr v3 core are used, so that any Zarr
reader opens a shard.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from emkd.storage.arrays.rearrange import LOW_BITS, key_dtype
from emkd.storage.manifest.manifest import Compression, Manifest
from emkd.storage.precision import STEPS, affinity_dtype, logits_dtype

TOKENS_PER_CHUNK = 16_384
BYTES_PER_CHUNK = 4 * 2**20

Axis = Literal["text", "vision", "affinity", "answer"]
AXES: tuple[Axis, ...] = ("text", "vision", "affinity", "answer")
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]

_TAIL = {"meaning": "natural logarithm of the sum of exp of the V - k logits that are not stored"}
_MEAN = {"meaning": "mean of the V - k logits that are not stored; 0 where there are none"}
_PLACE = {"meaning": "index of the answer token among its sample's text tokens"}


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array.

    axis:     what it is concatenated along
    width:    its other dimension, None for none
    by_rank:  that other dimension comes first
    shuffle:  of Blosc, before compression
    """

    name: str
    axis: Axis
    dtype: np.dtype[Any]
    width: int | None = None
    by_rank: bool = False
    shuffle: Shuffle = "bitshuffle"
    compression: Compression = "zstd"
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def token_axis(self) -> int:
        return 1 if self.by_rank else 0

    @property
    def tokens_per_chunk(self) -> int:
        return BYTES_PER_CHUNK // self.dtype.itemsize if self.width is None else TOKENS_PER_CHUNK

    def shape(self, length: int) -> tuple[int, ...]:
        if self.width is None:
            return (length,)
        return (self.width, length) if self.by_rank else (length, self.width)

    @property
    def dimension_names(self) -> tuple[str, ...]:
        first = {"affinity": "text_vision_pair"}.get(self.axis, f"{self.axis}_token")
        if self.width is None:
            return (first,)
        return ("rank", first) if self.by_rank else (first, "rank")


def array_layouts(manifest: Manifest) -> tuple[ArrayLayout, ...]:
    """The arrays of every shard of a cache, in the order of the module's table."""
    int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
    layouts = [
        ArrayLayout(name="text_ids", axis="text", dtype=int32),
        *_ids("vision", manifest.top_k, manifest),
        _logits("vision", manifest.top_k, manifest),
        ArrayLayout(name="vision_tail_logsumexp", axis="vision", dtype=float32, attributes=_TAIL),
        ArrayLayout(name="vision_tail_mean", axis="vision", dtype=float32, attributes=_MEAN),
        _affinity(manifest),
        ArrayLayout(name="answer_positions", axis="answer", dtype=int32, attributes=_PLACE),
        *_ids("answer", manifest.answer_top_k, manifest),
        _logits("answer", manifest.answer_top_k, manifest),
        ArrayLayout(name="answer_tail_logsumexp", axis="answer", dtype=float32, attributes=_TAIL),
    ]
    return tuple(replace(layout, compression=_compression(manifest)) for layout in layouts)


def _compression(manifest: Manifest) -> Compression:
    return manifest.compression or "zstd"


def _plain_shuffle(manifest: Manifest) -> Shuffle:
    """Of what is not rearranged. With lz4 of bytes, not of bits: a little larger, and faster to put back."""
    return "shuffle" if _compression(manifest) == "lz4" else "bitshuffle"


def _ids(axis: Literal["vision", "answer"], k: int, manifest: Manifest) -> list[ArrayLayout]:
    if not manifest.splits_ids:
        shuffle = _plain_shuffle(manifest)
        return [ArrayLayout(name=f"{axis}_ids", axis=axis, dtype=np.dtype(np.int32), width=k, shuffle=shuffle)]
    low = ArrayLayout(
        name=f"{axis}_ids_low",
        axis=axis,
        dtype=np.dtype(np.uint16),
        width=k,
        shuffle="shuffle",  # the lower of the two bytes does not compress at all, and is then only copied
        attributes={"meaning": "lower 16 bits of the ids, by descending logit; equal ones by ascending id"},
    )
    high = ArrayLayout(
        name=f"{axis}_ids_high",
        axis=axis,
        dtype=np.dtype(np.uint8),
        width=k,
        attributes={"meaning": f"id >> {LOW_BITS}"},
    )
    return [low, high] if manifest.vocabulary_size > 1 << LOW_BITS else [low]


def _logits(axis: Literal["vision", "answer"], k: int, manifest: Manifest) -> ArrayLayout:
    stored = logits_dtype(manifest.logits_precision)
    return ArrayLayout(
        name=f"{axis}_logits",
        axis=axis,
        dtype=key_dtype(stored) if manifest.rearranged else stored,
        width=k,
        by_rank=manifest.rearranged,
        shuffle="bitshuffle" if manifest.rearranged else _plain_shuffle(manifest),
        attributes=_key_attributes(manifest) if manifest.rearranged else _logits_attributes(manifest),
    )


def _affinity(manifest: Manifest) -> ArrayLayout:
    plainly = (_compression(manifest), manifest.affinity_precision) == ("zstd", "int8")
    return ArrayLayout(
        name="affinity",
        axis="affinity",
        dtype=affinity_dtype(manifest.affinity_precision),
        shuffle="noshuffle" if plainly else "bitshuffle",
        attributes=_affinity_attributes(manifest),
    )


def group_attributes(manifest: Manifest, shard: int) -> dict[str, Any]:
    """What a shard's Zarr group says of itself. The attempt is left out: equal rows make equal objects."""
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


def _logits_attributes(manifest: Manifest) -> dict[str, Any]:
    attributes = {
        "precision": manifest.logits_precision,
        "kind": "raw logits, descending; equal ones by ascending id",
        "temperature": 1,
    }
    if manifest.logits_precision != "float16" and manifest.logits_precision != "float32":
        attributes["stored_as"] = _number(manifest)
    return attributes


def _number(manifest: Manifest) -> str:
    """What stands for a logit."""
    if manifest.logits_precision in STEPS:
        return f"multiples of {STEPS[manifest.logits_precision]:g}"
    return {"bfloat16": "the upper 16 bits of the float32"}.get(manifest.logits_precision, "the number")


def _key_attributes(manifest: Manifest) -> dict[str, Any]:
    return {
        "precision": manifest.logits_precision,
        "kind": "raw logits, descending; equal ones by ascending id",
        "temperature": 1,
        "stored_as": f"keys: {_number(manifest)}, as unsigned integers of the same order; the first rank, then how "
        "much each rank falls below the one before it",
    }


def _affinity_attributes(manifest: Manifest) -> dict[str, Any]:
    order = "[vision, text]" if manifest.rearranged else "[text, vision]"
    attributes = {
        "precision": manifest.affinity_precision,
        "kind": f"cosine similarity of hidden states; each sample's {order} matrix row by row",
    }
    if manifest.affinity_precision == "int8":
        attributes["stored_as"] = "round(127 * cosine): divide by 127"
        if manifest.rearranged:
            attributes["stored_as"] = (
                "round(127 * cosine), as differences from vision token to vision token but for every 32nd of a sample"
            )
    return attributes
