from hypothesis import given
from hypothesis import strategies as st

from emkd.trainer.order import ShardSampler, epoch_order

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


def test_the_sampler_follows_the_epoch():
    sampler = ShardSampler([4, 4], 2, 7)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first == epoch_order([4, 4], 2, 7, 0).tolist()
    assert list(sampler) == epoch_order([4, 4], 2, 7, 1).tolist() != first
    assert len(sampler) == 8
