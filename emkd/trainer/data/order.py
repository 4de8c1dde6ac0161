"""The order of samples in an epoch, and which rank reads which: pure functions of (shard sizes, window, seed, epoch).

Shards are shuffled, and samples are shuffled within a window of consecutive shards of that order, so that a reader
holds `window` decoded shards and reads each shard once.

    epoch_order -> all samples, in order -> rank_batches -> the micro-batches of one rank

Every sample is used once per epoch, for any number of ranks and loader workers. Every rank has the same number of
micro-batches, and it is Trainer's: ceil(samples / (batch size * ranks)). The last micro-batches of all ranks divide
the remaining samples as evenly as possible (a rank may get an empty batch); Trainer's own sampler would repeat the
first samples of the epoch instead. `dataloader_drop_last` leaves the remainder out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


def epoch_order(shard_sizes: Sequence[int], window: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the positions [samples] of all samples in reading order; samples are counted from 0, shard after shard."""
    generator = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    shards = generator.permutation(len(shard_sizes))
    order = []
    for first in range(0, len(shards), window):
        numbers = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
        order.append(generator.permutation(np.concatenate(numbers)))
    return np.concatenate(order) if order else np.zeros(0, dtype=np.int64)


def n_batches(n_samples: int, batch_size: int, n_ranks: int = 1, drop_last: bool = False) -> int:
    """Return the number of micro-batches that each rank has in an epoch."""
    together = batch_size * n_ranks
    return n_samples // together if drop_last else -(-n_samples // together)


def rank_batches(
    order: NDArray[np.int64], batch_size: int, n_ranks: int = 1, rank: int = 0, drop_last: bool = False
) -> Iterator[NDArray[np.int64]]:
    """Yield the micro-batches of one rank, each [up to batch_size].

    At each step the ranks together read the next `batch_size * n_ranks` samples of the order, each rank a contiguous
    part of them; the remainder is divided into parts whose lengths differ by at most one.
    """
    together = batch_size * n_ranks
    whole = len(order) // together * together
    for start in range(rank * batch_size, whole, together):
        yield order[start : start + batch_size]
    if whole < len(order) and not drop_last:
        yield np.array_split(order[whole:], n_ranks)[rank]


class ShardBatchSampler(Sampler[list[int]]):
    """A DataLoader's `batch_sampler`: the `rank_batches` of the epoch given to `set_epoch` (0 before that)."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        window: int,
        seed: int,
        batch_size: int,
        n_ranks: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.shard_sizes, self.window, self.seed = list(shard_sizes), window, seed
        self.batch_size, self.n_ranks, self.rank, self.drop_last = batch_size, n_ranks, rank, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return n_batches(sum(self.shard_sizes), self.batch_size, self.n_ranks, self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.shard_sizes, self.window, self.seed, self.epoch)
        for batch in rank_batches(order, self.batch_size, self.n_ranks, self.rank, self.drop_last):
            yield batch.tolist()
