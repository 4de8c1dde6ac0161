from hypothesis import given
from hypothesis import strategies as st

from emkd.pipeline.batching import batches

lengths = st.lists(st.integers(1, 50), max_size=40)


@given(lengths=lengths, budget=st.integers(1, 200))
def test_every_sample_once_within_the_budget(lengths, budget):
    found = batches(lengths, budget)
    assert sorted(p for batch in found for p in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= budget


def test_similar_lengths_go_together():
    assert batches([9, 2, 8, 1], 18) == [[0, 2], [1, 3]]
