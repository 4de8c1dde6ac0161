"""TopLogits, the NumPy type of a cut distribution. Its torch twin: tests/vlm/test_truncated.py."""

import dataclasses
from typing import get_type_hints

import numpy as np
import pytest

from emkd.storage.record import TopLogits
from tests.storage.builders import top_k_of

N, V, K = 7, 30, 6
DENSE = (3 * np.random.default_rng(0).standard_normal((N, V))).astype(np.float32)
TOP = dataclasses.replace(top_k_of(DENSE, K), codes=np.arange(3 * N, dtype=np.int16).reshape(N, 3))
WITHOUT_MEAN = dataclasses.replace(TOP, tail_mean=None)
WITHOUT_CODES = dataclasses.replace(TOP, codes=None)

NAMES = [field.name for field in dataclasses.fields(TopLogits)]


def assert_same(found, expected):
    for name in NAMES:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_all_fields_are_arrays_over_the_tokens():
    """What the tests below rely on when they go through all fields."""
    assert all("NDArray" in str(kind) or "ndarray" in str(kind) for kind in get_type_hints(TopLogits).values())
    assert all(len(getattr(TOP, name)) == N for name in NAMES)


def test_length_and_k():
    assert len(TOP) == N
    assert TOP.k == K
    assert len(TOP.tokens(slice(0, 0))) == 0
    assert TOP.tokens(slice(0, 0)).k == K


def test_map_reaches_every_array():
    seen = []
    changed = TOP.map(lambda array: seen.append(id(array)) or array[::-1].copy())
    assert sorted(seen) == sorted(id(getattr(TOP, name)) for name in NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(changed, name), getattr(TOP, name)[::-1], err_msg=name)


def test_map_leaves_out_a_mean_that_there_is_not():
    assert_same(WITHOUT_MEAN.map(np.copy), WITHOUT_MEAN)


@pytest.mark.parametrize("top", [TOP, WITHOUT_MEAN], ids=["with a mean", "without"])
def test_tokens_are_views_of_some_rows(top):
    some = top.tokens(slice(2, 5))
    assert len(some) == 3
    for name in NAMES:
        whole, part = getattr(top, name), getattr(some, name)
        if whole is None:
            assert part is None
        else:
            np.testing.assert_array_equal(part, whole[2:5], err_msg=name)
            assert np.shares_memory(part, whole), name


@pytest.mark.parametrize("top", [TOP, WITHOUT_MEAN], ids=["with a mean", "without"])
def test_joined_undoes_tokens(top):
    parts = [top.tokens(slice(0, 3)), top.tokens(slice(3, 3)), top.tokens(slice(3, N))]
    assert_same(TopLogits.joined(parts), top)
    assert_same(TopLogits.joined([top]), top)


def test_joined_refuses_mixed_parts():
    with pytest.raises(ValueError, match="1 of 2 parts have a tail_mean; expected all or none"):
        TopLogits.joined([TOP, WITHOUT_MEAN])
    with pytest.raises(ValueError, match="1 of 2 parts have codes; expected all or none"):
        TopLogits.joined([TOP, WITHOUT_CODES])
    with pytest.raises(ValueError, match="dimension"):
        TopLogits.joined([WITHOUT_CODES, top_k_of(DENSE, K - 1)])


def test_n_bytes_is_the_memory_of_all_arrays():
    assert TOP.n_bytes == N * K * (4 + 4) + N * 4 + N * 4 + N * 3 * 2
    assert WITHOUT_MEAN.n_bytes == TOP.n_bytes - N * 4
    assert TOP.n_bytes == sum(getattr(TOP, name).nbytes for name in NAMES)


@pytest.mark.parametrize("k", [1, K, V])
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_the_retained_mass_is_that_of_a_float64_softmax(k, shift):
    """Logits of hundreds, too: exp of them overflows float32 or is 0."""
    shifted = (DENSE + np.float32(shift)).astype(np.float32)
    exact = shifted.astype(np.float64)
    p = np.exp(exact - exact.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    top = top_k_of(shifted, k) if k == V or not shift else _with_stable_tail(shifted, k)
    expected = np.take_along_axis(p, top.ids.astype(np.int64), axis=1).sum(axis=1)
    found = top.retained_mass()
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=2e-5 if shift else 1e-6)
    if k == V:
        np.testing.assert_array_equal(found, 1.0)


def _with_stable_tail(logits, k):
    """`top_k_of`, whose plain exp has no room for logits of hundreds, by way of logits around 0."""
    middle = np.float32(logits.mean())
    top = top_k_of(logits - middle, k)
    return dataclasses.replace(
        top,
        logits=np.take_along_axis(logits, top.ids.astype(np.int64), axis=1),
        tail_logsumexp=top.tail_logsumexp + middle,
        tail_mean=top.tail_mean + middle,
    )
