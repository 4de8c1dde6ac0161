"""One array of a shard: its name, shape, type, chunks and shuffle.

Shape legend: n_text, n_vision, n_answer are the tokens of all the shard's samples together (vision tokens that several
samples share are stored once), n_pairs is the sum of L * Nt over the samples; k, k' and the rest as in `record`.

    text_ids                [n_text]        int32
    vision_ids_low          [n_vision, k]   uint16: the lower 16 bits
    vision_ids_high         [n_vision, k]   uint8: the bits above them; only where V > 65,536
    vision_logits           [k, n_vision]   uint16 or uint32: keys, rank by rank (see `logits`)
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

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from emkd.storage.manifest.manifest import Compression

TOKENS_PER_CHUNK = 16_384
BYTES_PER_CHUNK = 4 * 2**20

Axis = Literal["text", "vision", "affinity", "answer"]
AXES: tuple[Axis, ...] = ("text", "vision", "affinity", "answer")
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]


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
        """The array's shape with so many elements along its axis."""
        if self.width is None:
            return (length,)
        return (self.width, length) if self.by_rank else (length, self.width)

    @property
    def dimension_names(self) -> tuple[str, ...]:
        first = {"affinity": "text_vision_pair"}.get(self.axis, f"{self.axis}_token")
        if self.width is None:
            return (first,)
        return ("rank", first) if self.by_rank else (first, "rank")


def plain_shuffle(compression: Compression) -> Shuffle:
    """For numbers that are not rearranged. With lz4 bytes, not bits: a little larger, and faster to put back."""
    return "shuffle" if compression == "lz4" else "bitshuffle"
