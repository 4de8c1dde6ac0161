"""What the disk rounds, and what a dtype explains."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emkd.errors import UsageError
from emkd.inspection.compare.against_teacher import judged
from emkd.inspection.compare.differences import Difference, Scale, half_unit
from emkd.storage.precision import round_logits
from emkd.vlm.tolerance import Tolerance, tolerance

NUMBERS = st.floats(-3e4, 3e4, width=32)


@given(NUMBERS, st.sampled_from(["bfloat16", "float16", "float32", "step0.1", "step0.2"]))
def test_half_a_unit_is_the_largest_rounding_error(value, precision):
    """No error is larger; and the neighbour of a stored number in that type is two halves away."""
    exact = np.array([value], dtype=np.float32)
    if precision.startswith("step"):
        exact /= 20  # these end at 3,276
    stored = round_logits(exact, precision)
    half = half_unit(torch.from_numpy(stored), precision).item()
    assert abs(float(stored[0]) - float(exact[0])) <= half
    if precision == "float32":
        assert half == 0
    elif precision.startswith("step"):
        assert half == pytest.approx(float(precision[4:]) / 2, rel=0.02)
    elif precision == "float16":
        assert 2 * half == float(np.spacing(np.abs(stored.astype(np.float16)))[0])
    elif abs(float(stored[0])) >= 2.0**-126:
        following = np.array([(np.abs(stored).view(np.uint32)[0] >> 16) + 1], dtype=np.uint32) << 16
        assert 2 * half == float(following.view(np.float32)[0]) - abs(float(stored[0]))


def test_what_each_dtype_explains():
    """mean 8 u, largest 64 u, of the scale; half for tails."""
    for dtype, unit in {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-11}.items():
        for quantity, scale, part in (
            ("vision_logits", 3.0, 1),
            ("answer_tail_logsumexp", 3.0, 0.5),
            ("affinity", 1.0, 1),
        ):
            found = tolerance(quantity, dtype, scale)
            assert found.mean == pytest.approx(8 * unit * scale * part)
            assert found.largest == pytest.approx(64 * unit * scale * part)
    with pytest.raises(UsageError, match="ran in float64; .* may differ only in float32, float16, bfloat16"):
        tolerance("affinity", "float64", 1.0)


def test_the_scale_is_a_root_mean_square_over_all_parts():
    scale = Scale()
    assert scale.value == 0
    for part in (torch.tensor([3.0, 4.0]), torch.zeros(0), torch.tensor([[12.0]])):
        scale.add(part)
    assert scale.value == pytest.approx((169 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("values", "rounding", "agrees"),
    [
        ([0.1, 0.1, 0.1], 0.0, True),
        ([0.3, 0.0, 0.0], 0.0, True),
        ([0.54, 0.0, 0.0], 0.0, False),  # the largest
        ([0.2, 0.2, 0.2], 0.0, False),  # the mean
        ([0.6, 0.2, 0.2], 0.15, True),  # what is left of them beyond rounding
        ([0.6, 0.2, 0.2], 0.05, False),
    ],
)
def test_mean_and_largest_both_decide(values, rounding, agrees):
    difference = Difference()
    difference.add(torch.tensor(values), rounding, 7)
    entry = judged(difference, Tolerance(mean=0.19, largest=0.5))
    assert entry["agrees"] == agrees
    assert (entry["mean"], entry["largest"]) == (pytest.approx(sum(values) / 3), pytest.approx(max(values)))
    assert entry["beyond"]["largest"] == pytest.approx(max(values) - rounding)
    assert (entry["n"], entry["worst"]) == (3, 7)
