"""The record: what the teacher leaves behind for one sample. NumPy only, no torch.

Shape legend
    L   text tokens of the sample (neither image placeholder nor padding)
    Nt  vision tokens of the teacher, all images of the sample together
    A   answer tokens
    k   stored logits of a vision token;  k' stored logits of an answer token
    V   ids of the teacher's tokenizer (padding rows of the LM head are cut before anything else)

All numbers are decoded here: logits are float32 and affinity is float32, whatever the precision on disk
(`storage/precision.py` encodes them). Rows of logits are in descending order, equal logits in ascending
order of ids, so that any smaller k is a slice.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ImageSpan:
    """Where one image of a sample stands and which of its vision tokens are its own.

    text_position: number of text tokens before the image's first vision token
    start, count:  its vision tokens are `[start, start + count)` of the sample's Nt
    grids:         (rows, columns) of each tile in token order; empty where the family's layout is not known
    original_size: (height, width) in pixels of the decoded image
    """

    text_position: int
    start: int
    count: int
    grids: tuple[tuple[int, int], ...]
    original_size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as the teacher saw it. Shapes in the module's legend.

    vision_tail_logsumexp: logsumexp of the V - k logits not stored, -inf where k = V (an empty tail)
    vision_tail_mean:      mean of those logits, 0 where the tail is empty
    affinity:              cosine similarity of text and vision hidden states, in [-1, 1]
    answer_positions:      index into text_ids of each answer token
    answer_logits:         of the logits that *predict* that token (full-sequence position p - 1)
    """

    key: str
    text_ids: NDArray[np.int32]  # [L]
    images: tuple[ImageSpan, ...]
    vision_ids: NDArray[np.int32]  # [Nt, k]
    vision_logits: NDArray[np.float32]  # [Nt, k]
    vision_tail_logsumexp: NDArray[np.float32]  # [Nt]
    vision_tail_mean: NDArray[np.float32]  # [Nt]
    affinity: NDArray[np.float32]  # [L, Nt]
    answer_positions: NDArray[np.int32]  # [A]
    answer_ids: NDArray[np.int32]  # [A, k']
    answer_logits: NDArray[np.float32]  # [A, k']
    answer_tail_logsumexp: NDArray[np.float32]  # [A]


@dataclass(frozen=True, kw_only=True)
class RowHint:
    """Where a sample was found: a hint only, because ids repeat and go missing in real data."""

    row: int  # 0-based over all files of the dataset, in plan order
    id: str  # the row's own id, "" where it has none


@dataclass(frozen=True, kw_only=True)
class CapturedRow:
    """One row of a shard's plan after the teacher's pass: a record, or the reason why there is none.

    text_sha256: of its roles and texts, images left out; "" where it has no conversation, None where not known
    halvings: how often the row's batch was halved because it did not fit the memory. In bfloat16 the numbers
        depend on the batch, so that a shard with halvings need not be bit-equal to one without.
    """

    hint: RowHint
    key: str  # "" where the row could not even be read
    record: Record | None
    reason: str = ""
    detail: str = ""
    halvings: int = 0
    text_sha256: str | None = None
