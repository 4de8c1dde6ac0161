"""The order of samples in an epoch: a pure function of (shard sizes, window, seed, epoch).

Shards come in a shuffled order, and samples are shuffled within a window of consecutive shards, so that a reader
holds `window` decoded shards and reads each one once.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def epoch_order(shard_sizes: Sequence[int], window: int, seed: int, epoch: int) -> np.ndarray:
    """[samples] int64 sample numbers in reading order; samples are numbered shard after shard."""
    generator = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    shards = generator.permutation(len(shard_sizes))
    order = []
    for first in range(0, len(shards), window):
        numbers = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
        order.append(generator.permutation(np.concatenate(numbers)))
    return np.concatenate(order) if order else np.zeros(0, dtype=np.int64)


class ShardSampler(Sampler[int]):
    """`epoch_order` as a sampler; the Trainer sets the epoch before each pass."""

    def __init__(self, shard_sizes: Sequence[int], window: int, seed: int) -> None:
        self.shard_sizes, self.window, self.seed = list(shard_sizes), window, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.shard_sizes, self.window, self.seed, self.epoch).tolist())
