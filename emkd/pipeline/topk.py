"""The k largest logits and what is left of the others, in chunks: the full [tokens, V] never exists.

Shape legend: n tokens, d hidden size, V ids of the tokenizer, k stored logits
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Stored logits and tail of n tokens.

    ids:            [n, k] int64, by descending logit, equal logits by ascending id
    logits:         [n, k] float32, as they will be stored (already rounded)
    tail_logsumexp: [n] float32 of the V - k logits not stored; -inf where k = V
    tail_mean:      [n] float32 of the same logits; 0 where k = V
    """

    ids: torch.Tensor
    logits: torch.Tensor
    tail_logsumexp: torch.Tensor
    tail_mean: torch.Tensor


def top_k(logits: torch.Tensor, k: int, rounded: torch.Tensor | None = None) -> TopK:
    """Top-k of float32 logits [n, V].

    rounded: the logits as the cache stores them. They decide which k are stored and in which order, so that
        ties on disk are ties here; the tail is taken from the exact ones. Default: the logits themselves.
    """
    stored = logits if rounded is None else rounded
    n, vocabulary = logits.shape
    k = min(k, vocabulary)
    keep = _largest(stored, k)
    ids = keep.nonzero()[:, 1].reshape(n, k)  # ascending within a row
    values = stored.gather(1, ids)
    order = values.argsort(dim=1, descending=True, stable=True)  # stable: ties stay in ascending order of ids
    if k == vocabulary:
        tail, mean = logits.new_full((n,), -torch.inf), logits.new_zeros(n)
    else:
        rest = logits.masked_fill(keep, -torch.inf)
        tail = rest.logsumexp(dim=1)
        mean = logits.masked_fill(keep, 0).sum(dim=1) / (vocabulary - k)
    return TopK(ids=ids.gather(1, order), logits=values.gather(1, order), tail_logsumexp=tail, tail_mean=mean)


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """[n, V] bool mask of the k largest of each row; among equals at the k-th place the smaller ids win.

    `torch.topk` leaves that choice open, and about half of all bfloat16 tokens have such a tie.
    """
    if k == values.shape[1]:
        return torch.ones_like(values, dtype=torch.bool)
    threshold = values.topk(k, dim=1).values[:, -1:]
    above = values > threshold
    level = values == threshold
    wanted = k - above.sum(dim=1, keepdim=True)
    return above | (level & (level.cumsum(dim=1) <= wanted))


def top_k_in_chunks(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    k: int,
    round_to: torch.dtype,
    chunk: int,
) -> TopK:
    """Top-k of `head(hidden)` for hidden states [n, d], `chunk` tokens at a time, on the device they are on.

    head: [m, d] -> float32 logits [m, V];  round_to: the dtype that the cache stores
    """
    parts = []
    for rows in hidden.split(chunk):
        logits = head(rows)
        parts.append(top_k(logits, k, logits.to(round_to).float()))
    if not parts:
        return _nothing(head(hidden).shape[1], k, hidden.device)
    return TopK(
        ids=torch.cat([part.ids for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        tail_logsumexp=torch.cat([part.tail_logsumexp for part in parts]),
        tail_mean=torch.cat([part.tail_mean for part in parts]),
    )


def _nothing(vocabulary: int, k: int, device: torch.device) -> TopK:
    k = min(k, vocabulary)
    empty = torch.zeros(0, device=device)
    return TopK(
        ids=torch.zeros(0, k, dtype=torch.int64, device=device),
        logits=torch.zeros(0, k, device=device),
        tail_logsumexp=empty,
        tail_mean=empty,
    )
