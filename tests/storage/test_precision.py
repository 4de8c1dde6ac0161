"""Rounding to disk and back, against naive references."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emkd.storage.precision import (
    affinity_dtype,
    decode_affinity,
    decode_logits,
    encode_affinity,
    encode_logits,
    logits_dtype,
    round_logits,
)

NORMAL = st.floats(2.0**-120, 2.0**120, width=32)
FINITE = arrays(np.float32, (3, 4), elements=NORMAL | NORMAL.map(lambda x: -x) | st.just(0.0))
COSINES = arrays(np.float32, 17, elements=st.floats(-1, 1, width=32))


def naive_bfloat16(value):
    """The nearer of the two neighbours with 16 zero bits; the even neighbour if both are equally near."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    low, high = bits & 0xFFFF0000, (bits & 0xFFFF0000) + 0x10000
    below, above = bits - low, high - bits
    chosen = low if below < above or (below == above and (low >> 16) % 2 == 0) else high
    return struct.unpack("<f", struct.pack("<I", chosen))[0]


@given(FINITE)
def test_bfloat16_is_the_nearest_even_neighbour(values):
    rounded = round_logits(values, "bfloat16")
    np.testing.assert_array_equal(rounded, [[naive_bfloat16(x) for x in row] for row in values.tolist()])
    assert (np.abs(rounded - values) <= 2.0**-8 * np.abs(values)).all()
    assert encode_logits(values, "bfloat16").dtype == np.uint16


@given(arrays(np.float32, (3, 4), elements=st.floats(-3276, 3276, width=32)), st.sampled_from(["step0.1", "step0.2"]))
def test_steps_are_the_nearest_multiples(values, precision):
    step = float(precision[4:])
    stored = encode_logits(values, precision)
    assert stored.dtype == np.int16
    rounded = round_logits(values, precision)
    assert (np.abs(rounded.astype(np.float64) - values) <= step / 2 + 1e-6 * np.abs(values)).all()
    np.testing.assert_allclose(rounded, stored.astype(np.float64) * step, rtol=1e-6)


def test_a_logit_without_such_a_multiple_is_refused():
    np.testing.assert_allclose(round_logits(np.array([-3276.7, 3276.7], np.float32), "step0.1"), [-3276.7, 3276.7])
    for wrong in (3276.9, -np.inf, np.inf):
        with pytest.raises(
            ValueError, match=r"does not fit in step0.1, which ends at multiple 32767 \(1 of 2 values\)"
        ):
            encode_logits(np.array([0, wrong], np.float32), "step0.1")


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_a_zero_has_no_sign(precision):
    """Otherwise two equal logits would be stored as different numbers."""
    zeros = np.array([0.0, -0.0, -1e-45], np.float32)[: 2 if precision == "float32" else 3]
    assert not np.signbit(round_logits(zeros, precision)).any()
    assert not encode_logits(zeros, precision).astype(bool).any()


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32", "step0.1", "step0.2"])
def test_rounding_twice_changes_nothing(precision):
    values = np.random.default_rng(0).normal(0, 20, (50, 8)).astype(np.float32)
    once = round_logits(values, precision)
    np.testing.assert_array_equal(round_logits(once, precision), once)
    assert once.dtype == np.float32
    if precision == "float32":
        np.testing.assert_array_equal(once, values)


def test_rounding_keeps_the_order():
    values = np.sort(np.random.default_rng(1).normal(0, 20, 1000).astype(np.float32))
    for precision in ("bfloat16", "float16", "step0.1"):
        assert (np.diff(round_logits(values, precision)) >= 0).all()


@pytest.mark.parametrize(
    ("value", "precision", "fits"),
    [
        (65504.0, "float16", True),
        (65519.0, "float16", True),  # rounds down to the largest half
        (65520.0, "float16", False),
        (-1e6, "float16", False),
        (1e6, "bfloat16", True),
        (3.3895e38, "bfloat16", True),
        (3.4e38, "bfloat16", False),
        (3.4e38, "float32", True),
    ],
)
def test_a_finite_logit_never_becomes_infinite_in_silence(value, precision, fits):
    logits = np.array([[0.5, value]], np.float32)
    if fits:
        assert np.isfinite(round_logits(logits, precision)).all()
    else:
        with pytest.raises(ValueError, match=rf"{precision} and would become infinite \(1 of 2 values\)"):
            encode_logits(logits, precision)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_infinities_stay_and_nan_is_refused(precision):
    masked = np.array([1.5, -np.inf], np.float32)
    np.testing.assert_array_equal(round_logits(masked, precision), masked)
    with pytest.raises(ValueError, match="1 of 2 are NaN"):
        encode_logits(np.array([1, np.nan], np.float32), precision)


@given(COSINES)
def test_int8_affinity_is_within_1_254(values):
    back = decode_affinity(encode_affinity(values, "int8"), "int8")
    assert (np.abs(back.astype(np.float64) - values) <= 1 / 254 + 1e-7).all()
    assert np.abs(back).max() <= 1


@given(COSINES)
def test_other_affinities(values):
    np.testing.assert_array_equal(decode_affinity(encode_affinity(values, "float32"), "float32"), values)
    half = decode_affinity(encode_affinity(values, "float16"), "float16")
    np.testing.assert_allclose(half, values, rtol=2**-11, atol=2**-25)


def test_a_hair_beyond_one_is_rounding_and_more_is_a_mistake():
    hair = np.array([1.0005, -1.0009, 0], np.float32)
    np.testing.assert_array_equal(encode_affinity(hair, "int8"), [127, -127, 0])
    np.testing.assert_array_equal(encode_affinity(hair, "float32"), hair)
    for wrong in (1.01, -2.0, np.nan):
        with pytest.raises(ValueError, match="expected cosines"):
            encode_affinity(np.array([0.5, wrong], np.float32), "int8")


def test_wrong_types_and_names_are_refused():
    with pytest.raises(ValueError, match="stored as uint16, got float32"):
        decode_logits(np.zeros(3, np.float32), "bfloat16")
    with pytest.raises(ValueError, match="stored as int8, got uint8"):
        decode_affinity(np.zeros(3, np.uint8), "int8")
    with pytest.raises(ValueError, match="'int4'; expected one of bfloat16, float16, float32, step0.1, step0.2"):
        logits_dtype("int4")
    with pytest.raises(ValueError, match="'bfloat16'; expected one of int8"):
        affinity_dtype("bfloat16")
