"""The record: the teacher's output for one sample. NumPy only, no torch.

Shape legend
    L   text tokens of the sample (neither image placeholder nor padding)
    Nt  vision tokens of the teacher, all images of the sample together
    A   answer tokens
    n   tokens of a TopLogits: Nt of Record.vision, A of Record.answer
    k   stored logits of a token: `top_k` of a vision token, `answer_top_k` of an answer token
    V   ids of the teacher's tokenizer (padding rows of the LM head are cut before anything else)
    r   codes of a token: integers that stand for its hidden state (`storage/basis.py`)

A record holds decoded numbers: logits and affinity are float32 for every precision on disk (`storage/precision.py`
encodes them). The logits of a token descend, with equal logits by ascending id, so that any smaller k is a slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ImageSpan:
    """The position of one image in its sample, and its vision tokens.

    text_position: number of text tokens before the image's first vision token
    start, count:  its vision tokens are `[start, start + count)` of the sample's Nt
    grids:         (rows, columns) of each tile in token order; empty if the family's layout is not known
    original_size: (height, width) in pixels of the decoded image
    """

    text_position: int
    start: int
    count: int
    grids: tuple[tuple[int, int], ...]
    original_size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """The k largest of the V logits of n tokens, and a summary of the tail.

    ids:            [n, k] by descending logit, equal logits by ascending id
    logits:         [n, k] float32, the logits of those ids
    tail_logsumexp: [n] logsumexp of the V - k logits that are not stored; -inf if k = V (an empty tail)
    tail_mean:      [n] mean of those logits, 0 if the tail is empty; None if it is not stored (answers)
    codes:          [n, r] of the hidden states that the logits were computed from, int16, or int8 if all of them fit;
                    None if they are not stored

    Its torch twin, which also holds the mass that a student lacks, is `emkd.vlm.truncated.TruncatedLogits`.
    """

    ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    tail_logsumexp: NDArray[np.float32]
    tail_mean: NDArray[np.float32] | None = None
    codes: NDArray[np.signedinteger] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        """Stored logits of each token."""
        return int(self.ids.shape[1])

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays in bytes."""
        optional = sum(array.nbytes for array in (self.tail_mean, self.codes) if array is not None)
        return self.ids.nbytes + self.logits.nbytes + self.tail_logsumexp.nbytes + optional

    def map(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "TopLogits":
        """Apply `change` to each array; every array has the tokens along its first axis."""
        return TopLogits(
            ids=change(self.ids),
            logits=change(self.logits),
            tail_logsumexp=change(self.tail_logsumexp),
            tail_mean=None if self.tail_mean is None else change(self.tail_mean),
            codes=None if self.codes is None else change(self.codes),
        )

    def tokens(self, chosen: slice) -> "TopLogits":
        """Return the chosen tokens, as views."""
        return self.map(lambda array: array[chosen])

    def retained_mass(self) -> NDArray[np.float64]:
        """Return the share of the softmax mass that the stored logits hold, [n]."""
        peak = self.logits[:, :1]  # the largest: logits descend
        stored = np.exp(self.logits - peak).sum(axis=1, dtype=np.float64)
        return stored / (stored + np.exp(self.tail_logsumexp.astype(np.float64) - peak[:, 0]))

    @staticmethod
    def joined(parts: "Sequence[TopLogits]") -> "TopLogits":
        """Concatenate the tokens of `parts`, which are not empty and have the same k.

        Raises ValueError if some parts have a tail_mean, or codes, and some do not.
        """
        means = [part.tail_mean for part in parts if part.tail_mean is not None]
        codes = [part.codes for part in parts if part.codes is not None]
        for name, found in (("a tail_mean", means), ("codes", codes)):
            if len(found) not in (0, len(parts)):
                raise ValueError(f"{len(found)} of {len(parts)} parts have {name}; expected all or none")
        return TopLogits(
            ids=np.concatenate([part.ids for part in parts]),
            logits=np.concatenate([part.logits for part in parts]),
            tail_logsumexp=np.concatenate([part.tail_logsumexp for part in parts]),
            tail_mean=np.concatenate(means) if means else None,
            codes=np.concatenate(codes) if codes else None,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as the teacher saw it. The module's docstring has the shape legend.

    vision:           logits of the Nt vision tokens
    affinity:         cosine similarity of text and vision hidden states, in [-1, 1]; None if the cache computes it
                      from codes (`Cache.affinity`)
    text_codes:       of the L text tokens; None if affinities are stored
    answer_positions: index into text_ids of each answer token
    answer:           the logits that *predict* the A answer tokens: those of full-sequence position p - 1 for the
                      token at p
    """

    key: str
    text_ids: NDArray[np.int32]  # [L]
    images: tuple[ImageSpan, ...]
    vision: TopLogits
    affinity: NDArray[np.float32] | None  # [L, Nt]
    answer_positions: NDArray[np.int32]  # [A]
    answer: TopLogits
    text_codes: NDArray[np.signedinteger] | None = None  # [L, r], int16, or int8 if all of them fit

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays in bytes."""
        plain = self.text_ids.nbytes + self.answer_positions.nbytes
        optional = sum(array.nbytes for array in (self.affinity, self.text_codes) if array is not None)
        return plain + optional + self.vision.n_bytes + self.answer.n_bytes


@dataclass(frozen=True, kw_only=True)
class RowHint:
    """The row that a sample was read from. A hint only: ids repeat and may be missing in real data."""

    row: int  # row of the dataset, 0-based over all its files
    id: str  # the row's own id, "" if it has none


@dataclass(frozen=True, kw_only=True)
class CapturedRow:
    """One row of a shard's plan after the teacher's pass: its record, or the reason why it was skipped.

    squared_error: mean square, over V, of the error of logits read from codes, of a few tokens; empty without codes
    text_sha256: hash of its roles and texts, without images; "" if it has no conversation, None if not known
    image_keys:  of each image, a hash of all that the teacher saw up to its end (`Encoded.image_keys`); not stored
    halvings:    how often the row's batch was halved because it did not fit into memory. In bfloat16 the numbers
                 depend on the batch, so a shard with halvings may differ in bits from one without.
    """

    hint: RowHint
    key: str  # "" if the row could not be read
    record: Record | None
    reason: str = ""
    detail: str = ""
    halvings: int = 0
    text_sha256: str | None = None
    image_keys: tuple[str, ...] = ()
    squared_error: tuple[float, ...] = ()
