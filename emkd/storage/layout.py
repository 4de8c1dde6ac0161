"""The arrays of a shard: names, shapes, types, chunks, codecs.

Shape legend: n_text, n_vision, n_answer are the tokens of all the shard's samples together, n_pairs is the
sum of L * Nt over the samples; k, k' and the rest as in `record`.

    text_ids               [n_text]        int32
    vision_ids             [n_vision, k]   int32
    vision_logits          [n_vision, k]   bfloat16 as uint16, float16 or float32
    vision_tail_logsumexp  [n_vision]      float32
    vision_tail_mean       [n_vision]      float32
    affinity               [n_pairs]       int8, float16 or float32; each sample's [L, Nt], row by row
    answer_positions       [n_answer]      int32
    answer_ids             [n_answer, k']  int32
    answer_logits          [n_answer, k']  as vision_logits
    answer_tail_logsumexp  [n_answer]      float32

Chunks hold up to 16,384 tokens of a two-dimensional array (4 MB of ids at k = 64; smaller ones read slower,
larger ones cost memory) and 4 MiB of a one-dimensional one, and are all of nearly the same size: the last
one is not padded with thousands of zeros. Only codecs of the Zarr v3 core are used, so that any Zarr reader
opens a shard.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from zarr.codecs import BloscCodec, ZstdCodec

from emkd.storage.manifest import Manifest
from emkd.storage.precision import affinity_dtype, logits_dtype

TOKENS_PER_CHUNK = 16_384
BYTES_PER_CHUNK = 4 * 2**20
ZSTD_LEVEL = 3
BLOSC_BLOCK_BYTES = 2**20  # Blosc's own choice is smaller and compresses less

Axis = Literal["text", "vision", "affinity", "answer"]
AXES: tuple[Axis, ...] = ("text", "vision", "affinity", "answer")


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array. `axis` is what it is concatenated along; `width` its second dimension, None for none."""

    name: str
    axis: Axis
    dtype: np.dtype[Any]
    width: int | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def shape(self, length: int) -> tuple[int, ...]:
        return (length,) if self.width is None else (length, self.width)

    def chunks(self, length: int) -> tuple[int, ...]:
        """Shape of a chunk: as few chunks as the limits allow, all of nearly the same size."""
        limit = BYTES_PER_CHUNK // self.dtype.itemsize if self.width is None else TOKENS_PER_CHUNK
        n_chunks = max(1, -(-length // limit))
        return self.shape(max(1, -(-length // n_chunks)))

    @property
    def dimension_names(self) -> tuple[str, ...]:
        first = {"affinity": "text_vision_pair"}.get(self.axis, f"{self.axis}_token")
        return (first,) if self.width is None else (first, "rank")

    @property
    def codec(self) -> BloscCodec | ZstdCodec:
        if self.dtype == np.int8:  # shuffling the bits of cosines makes them larger
            return ZstdCodec(level=ZSTD_LEVEL)
        return BloscCodec(
            typesize=self.dtype.itemsize,
            cname="zstd",
            clevel=ZSTD_LEVEL,
            shuffle="bitshuffle",
            blocksize=BLOSC_BLOCK_BYTES,
        )


def array_layouts(manifest: Manifest) -> tuple[ArrayLayout, ...]:
    """The arrays of every shard of a cache, in the order of the module's table."""
    int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
    k, answer_k = manifest.top_k, manifest.answer_top_k
    logits: dict[str, Any] = {
        "dtype": logits_dtype(manifest.logits_precision),
        "attributes": _logits_attributes(manifest),
    }
    tail = {"meaning": "natural logarithm of the sum of exp of the V - k logits that are not stored"}
    mean = {"meaning": "mean of the V - k logits that are not stored; 0 where there are none"}
    place = {"meaning": "index of the answer token among its sample's text tokens"}
    return (
        ArrayLayout(name="text_ids", axis="text", dtype=int32),
        ArrayLayout(name="vision_ids", axis="vision", dtype=int32, width=k),
        ArrayLayout(name="vision_logits", axis="vision", width=k, **logits),
        ArrayLayout(name="vision_tail_logsumexp", axis="vision", dtype=float32, attributes=tail),
        ArrayLayout(name="vision_tail_mean", axis="vision", dtype=float32, attributes=mean),
        ArrayLayout(
            name="affinity",
            axis="affinity",
            dtype=affinity_dtype(manifest.affinity_precision),
            attributes=_affinity_attributes(manifest),
        ),
        ArrayLayout(name="answer_positions", axis="answer", dtype=int32, attributes=place),
        ArrayLayout(name="answer_ids", axis="answer", dtype=int32, width=answer_k),
        ArrayLayout(name="answer_logits", axis="answer", width=answer_k, **logits),
        ArrayLayout(name="answer_tail_logsumexp", axis="answer", dtype=float32, attributes=tail),
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
    if manifest.logits_precision == "bfloat16":
        attributes["stored_as"] = "the upper 16 bits of the float32"
    return attributes


def _affinity_attributes(manifest: Manifest) -> dict[str, Any]:
    attributes = {
        "precision": manifest.affinity_precision,
        "kind": "cosine similarity of hidden states; each sample's [text, vision] matrix row by row",
    }
    if manifest.affinity_precision == "int8":
        attributes["stored_as"] = "round(127 * cosine): divide by 127"
    return attributes
