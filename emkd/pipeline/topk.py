"""The k largest logits and the tail, in chunks: the full [tokens, V] never exists.

It is cheap compared with the LM head, which a teacher has to compute anyway: it passes over V four times (largest of
each block, sum, exp, sum of that), in place, and on a CPU a few rows at a time, which stay in its cache meanwhile. It
looks for the k largest only in the blocks with the k largest maxima. Nothing waits for a device.

Shape legend: n tokens, d hidden size, V ids of the tokenizer, k stored logits, b ids of a block
"""

import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import log_softmax

from emkd.background import BackgroundConsumer
from emkd.vlm.truncated import TruncatedLogits, joined, truncated

BLOCK = 128  # ids; V / BLOCK maxima and k * BLOCK candidates are compared one by one
CACHED = 320_000  # logits that stay in the second-level cache (2 MB in servers) during the passes over them
ID_BITS = 32
CHUNKS = 6  # at least, for the tokens of a sample on a CPU
LEAST_OF_CHUNK = 256  # tokens, even if that makes fewer chunks; the LM head is slower on fewer tokens


def top_k(logits: torch.Tensor, k: int, round_to: torch.dtype = torch.float32, block: int = BLOCK) -> TruncatedLogits:
    """Top-k of logits [n, V], which stay unchanged.

    round_to: the dtype in which the cache stores them. The rounded logits decide which k are stored and in which
        order, so that ties on disk are ties here; the tail is computed from the exact logits.
    """
    return _take(logits.clone(), k, round_to, block)


def _take(logits: torch.Tensor, k: int, round_to: torch.dtype, block: int = BLOCK) -> TruncatedLogits:
    """Top-k of logits [n, V] of any floating dtype, which are overwritten."""
    n, vocabulary = logits.shape
    k = min(k, vocabulary)
    if k == vocabulary:
        ids = _largest(logits, k, block, round_to)
        tail, mean = logits.new_full((n,), -torch.inf, dtype=torch.float32), logits.new_zeros(n, dtype=torch.float32)
        return truncated(ids, _rounded(logits, ids, round_to), tail, vocabulary, mean)
    ids = _largest(logits, k + 1, block, round_to)
    ids, first = ids[:, :k], ids[:, k:]  # `first` is the largest of the tail, except for rounding
    stored, peak = _rounded(logits, ids, round_to), logits.gather(1, first).float()
    mean = logits.scatter_(1, ids, 0).sum(dim=1, dtype=torch.float32) / (vocabulary - k)
    logits.scatter_(1, ids, -torch.inf)
    tail = _tail_in_place(logits, peak) if logits.device.type == "cpu" else _tail_in_one_kernel(logits, first, peak)
    return truncated(ids, stored, tail, vocabulary, mean)


def _rounded(logits: torch.Tensor, ids: torch.Tensor, round_to: torch.dtype) -> torch.Tensor:
    """[n, k] float32 logits of the ids, as the cache stores them."""
    return logits.gather(1, ids).to(round_to).float()


def _largest(logits: torch.Tensor, k: int, block: int, round_to: torch.dtype) -> torch.Tensor:
    """[n, k] ids by descending rounded logit, ties by ascending id. `torch.topk` alone leaves ties open.

    Take the k blocks with the largest maxima, ties by smaller ids. Each has a logit that is at least as large as any
    logit outside these blocks, and if it is equal its id is smaller: no other block can have one of the k largest.
    """
    vocabulary = logits.shape[1]
    n_blocks = vocabulary // block
    if n_blocks <= 2 * k:
        return _order(logits.to(round_to), torch.arange(vocabulary, device=logits.device)).topk(k).indices
    blocks = logits[:, : n_blocks * block].unflatten(1, (n_blocks, block))
    numbers, offsets = (torch.arange(size, device=logits.device) for size in (n_blocks, block))
    chosen = _order(blocks.amax(dim=2).to(round_to), numbers).topk(k, sorted=False).indices
    candidates = blocks[torch.arange(len(logits), device=logits.device)[:, None], chosen].flatten(1)
    ids = (chosen[:, :, None] * block + offsets).flatten(1)
    if n_blocks * block < vocabulary:  # the ids after the last whole block
        rest = torch.arange(n_blocks * block, vocabulary, device=logits.device).expand(len(logits), -1)
        candidates, ids = torch.cat([candidates, logits[:, n_blocks * block :]], 1), torch.cat([ids, rest], 1)
    return ids.gather(1, _order(candidates.to(round_to), ids).topk(k).indices)


def _order(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys in the order of the values, equal values in the opposite order of their ids: no two keys are equal."""
    bits = (values.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it is equal to
    ascending = bits ^ ((bits >> 31) & 0x7FFF_FFFF)  # in negative numbers, all bits but the sign count backwards
    return (ascending.long() << ID_BITS) - ids


def _tail_in_place(logits: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """[n] logsumexp in float32 of logits, which are overwritten. peak: [n, 1] float32, about their largest"""
    return logits.float().sub_(peak).exp_().sum(dim=1).log_().add_(peak[:, 0])


def _tail_in_one_kernel(logits: torch.Tensor, first: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """The same for a GPU, whose memory is slow compared with arithmetic: log_softmax reads V twice and writes it once.

    first: [n, 1] an id whose logit is `peak`; its log-probability gives the logsumexp of all logits
    """
    return (peak - log_softmax(logits, dim=1, dtype=torch.float32).gather(1, first))[:, 0]


def top_k_in_chunks(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    k: int,
    round_to: torch.dtype,
    chunk: int,
) -> TruncatedLogits:
    """Top-k of `head(hidden)` for hidden states [n, d], `chunk` tokens at a time, on the device they are on.

    head: [m, d] -> logits [m, V] of any floating dtype, which are overwritten
    round_to: the dtype that the cache stores

    If a CPU has a core to spare, the top-k of a chunk runs while the LM head computes the next one: then the logits of
    two chunks are in memory. The chunks are the same either way: a head may give other bits in chunks of another size.
    """
    on_cpu = hidden.device.type == "cpu"
    if on_cpu:  # no LM head runs during the top-k of the last chunk
        chunk = min(chunk, max(LEAST_OF_CHUNK, -(-len(hidden) // CHUNKS)))

    def take(logits: torch.Tensor) -> list[TruncatedLogits]:
        return [_take(rows, k, round_to) for rows in _in_cache(logits)]

    beside = on_cpu and len(hidden) > chunk and _has_core_to_spare()
    # Without tokens there is one chunk of logits [0, V], so that k is limited to V as always.
    made = (head(rows) for rows in hidden.split(chunk))
    parts = _beside(take, made) if beside else list(map(take, made))
    return joined([part for some in parts for part in some])


def _has_core_to_spare() -> bool:
    """Whether torch uses fewer threads than this process may use; otherwise the two would wait for each other."""
    mine = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return torch.get_num_threads() < mine


def _beside(
    take: Callable[[torch.Tensor], list[TruncatedLogits]], made: Iterator[torch.Tensor]
) -> list[list[TruncatedLogits]]:
    """`take` of what is made, each in a second thread while the next one is being made."""
    inference = torch.is_inference_mode_enabled()  # of this thread; a new one starts without
    parts: list[list[TruncatedLogits]] = []

    def run(logits: torch.Tensor) -> None:
        with torch.inference_mode(inference):
            parts.append(take(logits))

    with BackgroundConsumer(run, lambda logits: 1, 1, "emkd-top-k") as chunks:  # one chunk at a time
        for logits in made:
            chunks.put(logits)
            del logits  # held here, it would take memory while the next one is made
    return parts


def _in_cache(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split logits [n, V] into as many rows as a CPU's cache holds; on a GPU they stay together."""
    if logits.device.type != "cpu":
        return iter([logits])
    return iter(logits.split(max(1, CACHED // logits.shape[1])))
