"""The DataLoaders of a run: training batches in the order of data/order.py, evaluation batches in the data's order."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from emkd.errors import UsageError
from emkd.trainer.data.order import ShardBatchSampler
from emkd.trainer.loop.stopping import keep_worker_alive

# From samples to a micro-batch: see `Collator`.
Collate = Callable[[list[Any]], Any]


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose batch sampler follows the epoch that Trainer announces."""

    batch_sampler: ShardBatchSampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0; Trainer calls this."""
        self.batch_sampler.set_epoch(epoch)


def train_loader(
    samples: Dataset[Any], collate: Collate, args: TrainingArguments, *, shard_sizes: list[int], window: int
) -> EpochLoader:
    """Return the training batches of this rank.

    Raises UsageError if `dataloader_drop_last` leaves no batch at all.
    """
    batches = ShardBatchSampler(
        shard_sizes,
        window=window,
        seed=args.seed,
        batch_size=args.per_device_train_batch_size,
        n_ranks=args.world_size,
        rank=args.process_index,
        drop_last=args.dataloader_drop_last,
    )
    if not len(batches):
        raise UsageError(
            f"{sum(shard_sizes)} samples are less than one batch of {batches.batch_size} on each of "
            f"{batches.n_ranks} workers, and dataloader_drop_last drops them: use a smaller "
            "per_device_train_batch_size, or dataloader_drop_last: false"
        )
    return EpochLoader(samples, batch_sampler=batches, **_options(collate, args))


def evaluation_loader(samples: Dataset[Any], collate: Collate, args: TrainingArguments) -> DataLoader[Any]:
    """Return batches of `eval_batch_size` samples, in the order of the data."""
    options = _options(collate, args) | {"persistent_workers": False}
    return DataLoader(samples, batch_size=args.eval_batch_size, **options)


def with_empty_batches(loader: DataLoader[Any], n_batches: int) -> Iterator[Any]:
    """Yield the batches of a loader, then empty ones up to `n_batches`: no rank may have fewer than another."""
    yield from loader
    for _ in range(n_batches - len(loader)):
        yield loader.collate_fn([])


def n_workers(args: TrainingArguments) -> int:
    """Return how many loader workers are started: no more than there are processors. Weights do not depend on it."""
    return min(args.dataloader_num_workers, len(os.sched_getaffinity(0)))


def _options(collate: Collate, args: TrainingArguments) -> dict[str, Any]:
    return {
        "collate_fn": collate,
        # A loader draws a seed whenever it starts; the model's random state must not change with that.
        "generator": torch.Generator(),
        "num_workers": n_workers(args),
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "worker_init_fn": keep_worker_alive,
    }
