"""One array of a shard: its name, shape, type, chunks and shuffle.

Shape legend: n_text, n_vision, n_answer are the tokens of all the shard's samples together (vision tokens that several
samples share are stored once), n_pairs is the sum of L * Nt over the samples. k is `top_k`, k' is `answer_top_k`; the
rest is as in `record`.

    text_ids                [n_text]        int32
    vision_ids_low          [n_vision, k]   uint16: the lower 16 bits
    vision_ids_high         [n_vision, k]   uint8: the bits above them; only if V > 65,536
    vision_logits           [k, n_vision]   uint16 or uint32: keys, rank by rank (see `logits`)
    vision_tail_logsumexp   [n_vision]      float32
    vision_tail_mean        [n_vision]      float32
    affinity                [n_pairs]       int8, float16 or float32; each sample's [Nt, L], row by row
    answer_positions        [n_answer]      int32
    answer_ids_low, answer_ids_high, answer_logits as for vision tokens, with k'
    answer_tail_logsumexp   [n_answer]      float32

With lz4, and in format version 1, logits and affinity are not rearranged:

    vision_logits, answer_logits  [n, k]     uint16 (bfloat16), float16, float32 or int16 (multiples of a step)
    affinity                      [n_pairs]  each sample's [L, Nt], row by row

If the cache has a basis (format version 4), codes of hidden states come on top, and with `--affinity codes` there are
codes of text tokens in place of the affinity (see `codes`):

    vision_codes, answer_codes, text_codes  [bytes]   uint8, and two short arrays of each

In format version 1, and with lz4 in version 2, ids are one array:

    vision_ids, answer_ids        [n, k]     int32

Chunks hold 16,384 tokens of a two-dimensional array (smaller chunks read slower, larger chunks cost memory) and 4 MiB
of a one-dimensional array, or the whole array if it is smaller. Arrays use only codecs of the Zarr v3 core, so that any
Zarr reader opens a shard.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from emkd.storage.manifest.manifest import Compression

TOKENS_PER_CHUNK = 16_384
BYTES_PER_CHUNK = 4 * 2**20

TokenAxis = Literal["text", "vision", "answer"]
TOKEN_AXES: tuple[TokenAxis, ...] = ("text", "vision", "answer")
# The axes whose offsets and counts the index of a shard has for each sample.
IndexedAxis = Literal["text", "vision", "affinity", "answer"]
AXES: tuple[IndexedAxis, ...] = ("text", "vision", "affinity", "answer")
# The axes of codes: their bytes, and their frames.
CodeAxis = Literal[
    "text_code_byte", "text_frame", "vision_code_byte", "vision_frame", "answer_code_byte", "answer_frame"
]
Axis = IndexedAxis | CodeAxis
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array.

    axis:    the axis along which samples are concatenated
    width:   size of the other dimension; None if the array has one dimension
    by_rank: the other dimension comes first
    shuffle: Blosc's shuffle before compression
    once_plain: whether caches exist that store it without a codec
    """

    name: str
    axis: Axis
    dtype: np.dtype[Any]
    width: int | None = None
    by_rank: bool = False
    shuffle: Shuffle = "bitshuffle"
    compression: Compression = "zstd"
    once_plain: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def token_axis(self) -> int:
        """Which dimension of the array is `axis`."""
        return 1 if self.by_rank else 0

    @property
    def tokens_per_chunk(self) -> int:
        """Elements of a full chunk along `axis`."""
        return BYTES_PER_CHUNK // self.dtype.itemsize if self.width is None else TOKENS_PER_CHUNK

    def shape(self, length: int) -> tuple[int, ...]:
        """Return the array's shape with `length` elements along `axis`."""
        if self.width is None:
            return (length,)
        return (self.width, length) if self.by_rank else (length, self.width)

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Names of the dimensions in Zarr's metadata."""
        tokens = {axis: f"{axis}_token" for axis in ("text", "vision", "answer")}
        first = (tokens | {"affinity": "text_vision_pair"}).get(self.axis, self.axis)
        if self.width is None:
            return (first,)
        return ("rank", first) if self.by_rank else (first, "rank")


def frame_axes(axis: TokenAxis) -> tuple[CodeAxis, CodeAxis]:
    """Return the axes of the bytes and of the frames of a token axis's codes."""
    axes: dict[TokenAxis, tuple[CodeAxis, CodeAxis]] = {
        "text": ("text_code_byte", "text_frame"),
        "vision": ("vision_code_byte", "vision_frame"),
        "answer": ("answer_code_byte", "answer_frame"),
    }
    return axes[axis]


def plain_shuffle(compression: Compression) -> Shuffle:
    """Return the shuffle for numbers that are not rearranged. lz4 shuffles bytes: a little larger, and faster to read
    than shuffled bits."""
    return "shuffle" if compression == "lz4" else "bitshuffle"
