"""The numbers of a heat map, against loops."""

import numpy as np
import pytest

from emkd.inspection.report.heatmap import answer_grids, bin_columns, bounds, choose_rows, levels, split_tiles, spread


def naive_bins(values, counts, limit):
    """Means over tokens of equally many neighbouring columns, the smallest number of them that fits."""
    each = next(each for each in range(1, 1000) if len(range(0, len(counts), each)) <= limit)
    rows, sums = [], []
    for row in values:
        found, sums = [], []
        for start in range(0, len(counts), each):
            part = range(start, min(start + each, len(counts)))
            sums.append(sum(counts[i] for i in part))
            found.append(sum(row[i] * counts[i] for i in part) / sums[-1])
        rows.append(found)
    return np.array(rows), sums


@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 129, 576])
@pytest.mark.parametrize("limit", [1, 8, 64])
def test_columns_are_means_of_neighbours(n, limit):
    rng = np.random.default_rng(n)
    values, counts = rng.normal(size=(3, n)), rng.integers(1, 9, n)
    for weights in (np.ones(n, int), counts):
        found, sums = bin_columns(values, weights, limit)
        expected, expected_sums = naive_bins(values, weights.tolist(), limit)
        np.testing.assert_allclose(found, expected)
        assert sums.tolist() == expected_sums
        assert found.shape[1] <= limit


def test_binning_twice_is_still_a_mean_of_tokens():
    values = np.random.default_rng(0).normal(size=(2, 130))
    twice, counts = bin_columns(*bin_columns(values, np.ones(130), 64), 11)
    np.testing.assert_allclose(np.average(twice, axis=1, weights=counts), values.mean(axis=1))
    assert counts.sum() == 130


@pytest.mark.parametrize(("n", "chosen"), [(0, 5), (3, 5), (5, 5), (40, 7), (312, 10), (41, 40)])
def test_spread_takes_distinct_numbers_with_even_gaps(n, chosen):
    found = spread(n, chosen)
    assert len(found) == min(n, chosen)
    assert found == sorted(set(found))
    assert all(0 <= i < n for i in found)
    gaps = np.diff(found)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert not found or abs(found[0] - (n - 1 - found[-1])) <= 1  # as far from both ends


@pytest.mark.parametrize(
    ("n_rows", "answers", "n_answers"),
    [
        (40, range(30, 40), 10),
        (312, range(280, 310), 30),
        (312, range(270, 310), 40),  # all there is room for
        (312, range(100, 312), 30),  # the question is seen too
        (45, range(3, 45), 37),  # all of the few others
        (100, (), 0),
    ],
)
def test_rows_of_answers_and_others_between(n_rows, answers, n_answers):
    found = choose_rows(n_rows, list(answers))
    assert found == sorted(set(found))
    assert len(found) == 40
    assert set(found) <= set(range(n_rows))
    assert len(set(found) & set(answers)) == n_answers
    others = [row for row in range(n_rows) if row not in answers]
    assert len(set(found) & set(others)) == 40 - n_answers


def test_few_rows_are_all_shown():
    assert choose_rows(7, [5]) == list(range(7))


def test_answers_on_the_tiles():
    affinity = np.random.default_rng(0).normal(size=(6, 22)).astype(np.float32)
    grids = ((3, 4), (2, 5))
    tiles = answer_grids(affinity, [1, 4], grids)
    at = 0
    for tile, (rows, columns) in zip(tiles, grids, strict=True):
        for row in range(rows):
            for column in range(columns):
                assert tile[row][column] == pytest.approx((affinity[1, at] + affinity[4, at]) / 2)
                at += 1
    assert answer_grids(affinity, [], grids) == []
    assert answer_grids(affinity, [1], ()) == []
    assert answer_grids(affinity, [1], ((3, 4),)) == []  # not the grid of these tokens
    (wide,) = answer_grids(np.ones((1, 2 * 70), np.float32), [0], ((2, 70),))
    assert wide.shape == (2, 35)


def test_tiles_follow_each_other():
    assert split_tiles(11, ((2, 4), (3, 1))) == [(slice(0, 8), (2, 4)), (slice(8, 11), (3, 1))]
    assert split_tiles(12, ((2, 4), (3, 1))) == []


def test_levels_are_equal_steps_over_the_range():
    assert levels([[-1, -0.61, -0.59, 0, 0.19, 0.59, 0.61, 1]], -1, 1, 5).tolist() == [[0, 0, 1, 2, 2, 3, 4, 4]]
    assert levels([0.3, 0.3], 0.3, 0.3, 5).tolist() == [0, 0]
    assert levels([-5, 5], -1, 1, 5).tolist() == [0, 4]


def test_bounds_of_several_arrays():
    assert bounds([np.array([[1, -2]]), [], [[3.5]]]) == (-2, 3.5)
    assert bounds([]) == (0, 0)
