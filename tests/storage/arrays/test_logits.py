"""Stored logits: unchanged, and as keys rank by rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from emkd.storage.arrays.logits import (
    PlainLogits,
    RankedLogits,
    by_rank,
    from_keys,
    from_ranks,
    key_dtype,
    logits,
    to_keys,
)
from emkd.storage.precision import encode_logits
from tests.storage.arrays.codec import ArrayCodecTests
from tests.storage.builders import make_manifest

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=70)
STORED = [("bfloat16", np.uint16), ("float16", np.float16), ("float32", np.float32), ("step0.1", np.int16)]
K = 3


class LogitsTests(ArrayCodecTests):
    is_view = True
    precision = "bfloat16"

    def values(self, rng, n):
        return encode_logits(-np.sort(-rng.normal(0, 5, (n, K)).astype(np.float32), axis=1), self.precision)


class TestLogitsOfVersion1(LogitsTests):
    form = PlainLogits
    kind = logits("vision", K, make_manifest(format_version=1, compression=None))


class TestLogitsWithLz4(LogitsTests):
    form = PlainLogits
    kind = logits("vision", K, make_manifest(compression="lz4"))


class TestLogitsInFloat32WithLz4(LogitsTests):
    form, precision = PlainLogits, "float32"
    kind = logits("answer", K, make_manifest(compression="lz4", logits="float32"))


class TestLogitsWithZstd(LogitsTests):
    form = RankedLogits
    kind = logits("vision", K, make_manifest())


class TestLogitsOfVersion2WithZstd(LogitsTests):
    form = RankedLogits
    kind = logits("vision", K, make_manifest(format_version=2))


class TestLogitsInFloat16(LogitsTests):
    form, precision = RankedLogits, "float16"
    kind = logits("vision", K, make_manifest(logits="float16"))


class TestLogitsInFloat32(LogitsTests):
    form, precision = RankedLogits, "float32"
    kind = logits("vision", K, make_manifest(logits="float32"))


class TestLogitsInSteps(LogitsTests):
    form, precision = RankedLogits, "step0.1"
    kind = logits("answer", K, make_manifest(logits="step0.1"))


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
