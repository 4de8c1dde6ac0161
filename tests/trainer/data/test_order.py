from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from emkd.trainer.data.order import ShardBatchSampler, epoch_order, n_batches, rank_batches

sizes = st.lists(st.integers(0, 9), max_size=8)


@given(sizes=sizes, window=st.integers(1, 5), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_every_sample_once(sizes, window, seed, epoch):
    assert sorted(epoch_order(sizes, window, seed, epoch).tolist()) == list(range(sum(sizes)))


def test_a_pure_function_that_changes_with_seed_and_epoch():
    orders = {(s, e): tuple(epoch_order([9, 9, 9], 2, s, e)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert tuple(epoch_order([9, 9, 9], 2, 1, 1)) == orders[1, 1]


@given(window=st.integers(1, 4), seed=st.integers(0, 99))
def test_reads_are_whole(window, seed):
    """Samples of a window of shards come together, so a reader that holds `window` shards reads each once."""
    order = epoch_order([5] * 8, window, seed, 0).tolist()
    for start in range(0, 40, 5 * window):
        part = order[start : start + 5 * window]
        assert len({number // 5 for number in part}) == len(part) // 5


def sampler(sizes, **chosen):
    return ShardBatchSampler(sizes, **{"window": 2, "seed": 7, "batch_size": 3, **chosen})


def of_all_ranks(sizes, n_ranks, **chosen):
    return [list(sampler(sizes, n_ranks=n_ranks, rank=rank, **chosen)) for rank in range(n_ranks)]


@given(sizes=sizes, n_ranks=st.integers(1, 5), batch_size=st.integers(1, 6), seed=st.integers(0, 99))
def test_every_sample_once_over_all_ranks(sizes, n_ranks, batch_size, seed):
    ranks = of_all_ranks(sizes, n_ranks, batch_size=batch_size, seed=seed)
    assert sorted(n for batches in ranks for batch in batches for n in batch) == list(range(sum(sizes)))
    # As many steps as Trainer users expect, the same on every rank (or one would wait for ever), each but the last of
    # full batches.
    expected = -(-sum(sizes) // (batch_size * n_ranks))
    assert [len(batches) for batches in ranks] == [expected] * n_ranks
    assert [len(sampler(sizes, n_ranks=n_ranks, batch_size=batch_size))] == [expected]
    for batches in ranks:
        assert all(len(batch) == batch_size for batch in batches[:-1])
    if expected:
        last = [len(batches[-1]) for batches in ranks]
        assert max(last) - min(last) <= 1, "the remainder is shared"


@given(sizes=sizes, n_ranks=st.integers(1, 5), batch_size=st.integers(1, 6))
def test_what_a_step_learns_from_does_not_depend_on_the_ranks(sizes, n_ranks, batch_size):
    """n ranks with batches of b walk the same samples step by step as one rank with batches of n * b."""
    ranks = of_all_ranks(sizes, n_ranks, batch_size=batch_size)
    steps = [[*chain(*parts)] for parts in zip(*ranks, strict=True)]
    assert steps == list(sampler(sizes, batch_size=batch_size * n_ranks))


@given(sizes=sizes, n_ranks=st.integers(1, 5), batch_size=st.integers(1, 6))
def test_dropping_the_last_leaves_out_less_than_a_step(sizes, n_ranks, batch_size):
    ranks = of_all_ranks(sizes, n_ranks, batch_size=batch_size, drop_last=True)
    seen = [n for batches in ranks for batch in batches for n in batch]
    assert len(seen) == len(set(seen)) == sum(sizes) // (batch_size * n_ranks) * batch_size * n_ranks
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_the_order_is_the_same_for_any_number_of_loader_workers(n_workers):
    loader = DataLoader(torch.arange(23), batch_sampler=sampler([9, 9, 5]), num_workers=n_workers)
    assert [batch.tolist() for batch in loader] == list(sampler([9, 9, 5]))


def test_the_sampler_follows_the_epoch():
    batches = sampler([4, 4])
    first = list(batches)
    batches.set_epoch(1)
    assert [*chain(*first)] == epoch_order([4, 4], 2, 7, 0).tolist()
    assert [*chain(*batches)] == epoch_order([4, 4], 2, 7, 1).tolist() != [*chain(*first)]


@given(
    n=st.integers(0, 40),
    batch_size=st.integers(1, 6),
    n_ranks=st.integers(1, 5),
    rank=st.integers(0, 4),
    drop_last=st.booleans(),
)
def test_each_step_is_split_over_the_ranks(n, batch_size, n_ranks, rank, drop_last):
    """Naive: the samples of each step, as evenly as can be."""
    rank, order, together = rank % n_ranks, np.arange(n)[::-1], batch_size * n_ranks
    steps = range(n_batches(n, batch_size, n_ranks, drop_last))
    naive = [np.array_split(order[step * together : (step + 1) * together], n_ranks)[rank] for step in steps]
    found = list(rank_batches(order, batch_size, n_ranks, rank, drop_last))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in naive]


def test_rank_batches_by_hand():
    order = np.arange(10)
    parts = [[batch.tolist() for batch in rank_batches(order, 2, 2, rank)] for rank in range(2)]
    assert parts == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
    assert [b.tolist() for b in rank_batches(np.arange(5), 2, 2, 1)] == [[2, 3], []], "nothing is left for this rank"
    assert n_batches(10, 2, 2, drop_last=True) == 2
