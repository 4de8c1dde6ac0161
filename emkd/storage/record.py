"""The record: what the teacher leaves behind for one sample. NumPy only, no torch.

Shape legend
    L   text tokens of the sample (neither image placeholder nor padding)
    Nt  vision tokens of the teacher, all images of the sample together
    A   answer tokens
    n   tokens of a TopLogits: Nt of Record.vision, A of Record.answer
    k   stored logits of a token: `top_k` of a vision token, `answer_top_k` of an answer token
    V   ids of the teacher's tokenizer (padding rows of the LM head are cut before anything else)

All numbers are decoded here: logits are float32 and affinity is float32, whatever the precision on disk
(`storage/precision.py` encodes them). Logits of a token descend, equal ones by ascending id, so that any smaller
k is a slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
class TopLogits:
    """The k largest of the V logits of n tokens, and what is known of the others: the tail.

    ids:            [n, k] by descending logit, equal logits by ascending id
    logits:         [n, k] float32 of those ids
    tail_logsumexp: [n] logsumexp of the V - k logits that are not stored, -inf where k = V (an empty tail)
    tail_mean:      [n] mean of those logits, 0 where the tail is empty; None where it is not stored (answers)

    Its torch twin, with what a student lacks, is `emkd.vlm.truncated.TruncatedLogits`.
    """

    ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    tail_logsumexp: NDArray[np.float32]
    tail_mean: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])

    @property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        tail_mean = 0 if self.tail_mean is None else self.tail_mean.nbytes
        return self.ids.nbytes + self.logits.nbytes + self.tail_logsumexp.nbytes + tail_mean

    def map(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "TopLogits":
        """The same with each array changed; all of them have the tokens along their first axis."""
        return TopLogits(
            ids=change(self.ids),
            logits=change(self.logits),
            tail_logsumexp=change(self.tail_logsumexp),
            tail_mean=None if self.tail_mean is None else change(self.tail_mean),
        )

    def tokens(self, chosen: slice) -> "TopLogits":
        """Some of the tokens, as views."""
        return self.map(lambda array: array[chosen])

    def retained_mass(self) -> NDArray[np.float64]:
        """[n] share of the softmax mass that the stored logits hold."""
        peak = self.logits[:, :1]  # they descend
        stored = np.exp(self.logits - peak).sum(axis=1, dtype=np.float64)
        return stored / (stored + np.exp(self.tail_logsumexp.astype(np.float64) - peak[:, 0]))

    @staticmethod
    def joined(parts: "Sequence[TopLogits]") -> "TopLogits":
        """The tokens of all parts, one after the other: at least one part, with the same k, all with a tail_mean or
        none."""
        means = [part.tail_mean for part in parts if part.tail_mean is not None]
        if len(means) not in (0, len(parts)):
            raise ValueError(f"{len(means)} of {len(parts)} parts have a tail_mean; expected all or none")
        return TopLogits(
            ids=np.concatenate([part.ids for part in parts]),
            logits=np.concatenate([part.logits for part in parts]),
            tail_logsumexp=np.concatenate([part.tail_logsumexp for part in parts]),
            tail_mean=np.concatenate(means) if means else None,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as the teacher saw it. Shapes in the module's legend.

    vision:           of the Nt vision tokens
    affinity:         cosine similarity of text and vision hidden states, in [-1, 1]
    answer_positions: index into text_ids of each answer token
    answer:           of the A logits that *predict* those tokens (full-sequence position p - 1)
    """

    key: str
    text_ids: NDArray[np.int32]  # [L]
    images: tuple[ImageSpan, ...]
    vision: TopLogits
    affinity: NDArray[np.float32]  # [L, Nt]
    answer_positions: NDArray[np.int32]  # [A]
    answer: TopLogits

    @property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        plain = self.text_ids.nbytes + self.affinity.nbytes + self.answer_positions.nbytes
        return plain + self.vision.n_bytes + self.answer.n_bytes


@dataclass(frozen=True, kw_only=True)
class RowHint:
    """Where a sample was found: a hint only, because ids repeat and go missing in real data."""

    row: int  # 0-based over all files of the dataset, in plan order
    id: str  # the row's own id, "" where it has none


@dataclass(frozen=True, kw_only=True)
class CapturedRow:
    """One row of a shard's plan after the teacher's pass: a record, or the reason why there is none.

    text_sha256: of its roles and texts, images left out; "" where it has no conversation, None where not known
    image_keys: of each image, a hash of all that the teacher saw up to its end (`Encoded.image_keys`); not stored
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
    image_keys: tuple[str, ...] = ()
