import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emkd.pipeline.batching import batches

lengths = st.lists(st.integers(1, 50), max_size=40)
budgets = st.integers(1, 200)


@given(lengths=lengths, budget=budgets)
def test_every_sample_once_within_the_budget(lengths, budget):
    found = batches(lengths, budget)
    assert sorted(p for batch in found for p in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= budget


@given(lengths=lengths, budget=budgets)
def test_a_function_of_lengths_and_budget_alone(lengths, budget):
    """The same answer for equal arguments of another type and identity, which are left as they were."""
    before = list(lengths)
    assert batches(tuple(lengths), budget) == batches(lengths, budget)
    assert lengths == before


@given(lengths=lengths, budget=budgets)
def test_longest_first_and_equal_ones_in_their_order(lengths, budget):
    flat = [p for batch in batches(lengths, budget) for p in batch]
    assert flat == sorted(flat, key=lambda p: (-lengths[p], p))


@given(data=st.data(), lengths=lengths, budget=budgets)
def test_another_order_of_the_rows_makes_batches_of_the_same_lengths(data, lengths, budget):
    """So that the batches depend on the lengths alone, and never on the positions of the rows."""
    order = data.draw(st.permutations(range(len(lengths))))
    shuffled = [lengths[p] for p in order]
    assert sizes(batches(shuffled, budget), shuffled) == sizes(batches(lengths, budget), lengths)


@given(lengths=lengths, budget=budgets)
def test_no_two_neighbours_could_have_been_one(lengths, budget):
    """Whole batches: the next sample, which is no longer than any of them, would have broken the budget."""
    found = batches(lengths, budget)
    for batch in found[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def sizes(found, lengths):
    return [[lengths[p] for p in batch] for batch in found]


def test_similar_lengths_go_together():
    assert batches([9, 2, 8, 1], 18) == [[0, 2], [1, 3]]


def test_samples_beyond_the_budget_are_batches_of_their_own():
    assert batches([300, 5, 200, 5], 10) == [[0], [2], [1, 3]]
    assert batches([5, 5], 1) == [[0], [1]]
    assert batches([], 10) == []


class Counted(int):
    """An integer that counts how often it is negated or multiplied, which is what `batches` does with lengths."""

    steps = 0

    def __neg__(self):
        Counted.steps += 1
        return CountedKey(-int(self))

    def __rmul__(self, other):
        Counted.steps += 1
        return int(self) * other


class CountedKey(int):
    def __lt__(self, other):
        Counted.steps += 1
        return int(self) < int(other)

    def __eq__(self, other):
        Counted.steps += 1
        return int(self) == int(other)

    __hash__ = int.__hash__


@pytest.mark.parametrize("n", [1_000, 16_000])
def test_steps_grow_as_n_log_n(n):
    """Counted, not timed: comparisons of the sort, and one or two products a sample."""
    Counted.steps = 0
    batches([Counted(1 + (p * 7919) % 997) for p in range(n)], 8192)
    assert n < Counted.steps < 3 * n * math.log2(n)
