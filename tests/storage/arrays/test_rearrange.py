"""Integers rearranged and back, exactly; and what the rearranging is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from emkd.storage.arrays.rearrange import (
    along_tokens,
    by_rank,
    from_keys,
    from_ranks,
    from_tokens,
    join_ids,
    key_dtype,
    split_ids,
    to_keys,
)
from emkd.storage.precision import encode_logits

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=70)
STORED = [("bfloat16", np.uint16), ("float16", np.float16), ("float32", np.float32), ("step0.1", np.int16)]


@settings(deadline=None)
@given(arrays(np.int32, SHAPES, elements=st.integers(0, 2**24 - 1)))
def test_ids(ids):
    low, high = split_ids(ids)
    assert (low.dtype, high.dtype) == (np.uint16, np.uint8)
    np.testing.assert_array_equal(join_ids(low, high), ids)
    np.testing.assert_array_equal(join_ids(low, None), ids % 65_536)


@pytest.mark.parametrize(("precision", "dtype"), STORED)
@settings(deadline=None)
@given(data=st.data())
def test_keys_are_ordered_as_the_logits(precision, dtype, data):
    finite = st.floats(-3000, 3000, width=32)
    values = data.draw(arrays(np.float32, 20, elements=finite))
    if precision != "step0.1":
        values[:2] = np.inf, -np.inf
    stored = encode_logits(values, precision)
    assert stored.dtype == dtype
    keys = to_keys(stored)
    assert keys.dtype == key_dtype(stored.dtype)
    np.testing.assert_array_equal(from_keys(keys, stored.dtype), stored)
    rounded = (
        stored.astype(np.float64) if precision != "bfloat16" else (stored.astype(np.uint32) << 16).view(np.float32)
    )
    for key, value in zip(keys, rounded, strict=True):
        np.testing.assert_array_equal(keys > key, rounded > value)
        np.testing.assert_array_equal(keys == key, rounded == value)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@settings(deadline=None)
@given(data=st.data())
def test_ranks(dtype, data):
    keys = data.draw(arrays(dtype, SHAPES))
    ranks = by_rank(keys)
    assert ranks.shape == keys.shape[::-1]
    np.testing.assert_array_equal(from_ranks(ranks), keys.T)
    falling = -np.sort(-keys.astype(np.int64), axis=1)
    if falling.size:
        naive = np.concatenate([falling[:, :1], falling[:, :-1] - falling[:, 1:]], axis=1).T
        np.testing.assert_array_equal(by_rank(falling.astype(dtype)), naive)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (3, 5)])
def test_the_keys_are_left_as_they_are(shape):
    keys = np.full(shape, 7, np.uint16)
    by_rank(keys)
    assert (keys == 7).all()


@settings(deadline=None)
@given(arrays(np.int8, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=80)))
def test_affinity(affinity):
    np.testing.assert_array_equal(from_tokens(along_tokens(affinity)), affinity)


def test_neighbours_are_subtracted_and_every_32nd_token_is_itself():
    affinity = np.arange(70, dtype=np.int8)[:, None] + np.array([[0, 5]], np.int8)
    differences = along_tokens(affinity)
    np.testing.assert_array_equal(differences[[0, 32, 64]], affinity[[0, 32, 64]])
    assert (np.delete(differences, [0, 32, 64], axis=0) == 1).all()
