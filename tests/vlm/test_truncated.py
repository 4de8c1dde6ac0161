import dataclasses
from typing import get_type_hints

import numpy as np
import pytest
import torch

from emkd.storage.record import TopLogits
from emkd.vlm.truncated import TruncatedLogits, joined
from tests.trainer import naive

V = 40
DENSE = 3 * torch.randn(9, V, generator=torch.Generator().manual_seed(0))


def assert_same(found: TruncatedLogits, expected: TruncatedLogits) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.tail_logsumexp, expected.tail_logsumexp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.tail_mean, expected.tail_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stored", "wanted"), [(40, 7), (20, 7), (20, 1), (7, 7), (7, 20)])
def test_a_smaller_k_is_a_slice_with_the_rest_folded_in(stored, wanted):
    assert_same(naive.cut(DENSE, stored).smaller(wanted), naive.cut(DENSE, min(stored, wanted)))


def test_whole_only_where_nothing_is_cut():
    assert naive.cut(DENSE, V).whole
    assert not naive.cut(DENSE, V - 1).whole
    assert not naive.cut(DENSE, V).for_student(V - 1).whole


def test_the_mass_of_lacking_ids_is_that_of_the_full_softmax():
    cut = naive.cut(DENSE, 20)
    full = torch.zeros(DENSE.shape, dtype=torch.float64).scatter_(
        1, cut.ids, DENSE.double().softmax(1).gather(1, cut.ids)
    )
    torch.testing.assert_close(cut.for_student(25).lacking_mass().double(), full[:, 25:].sum(1), atol=1e-6, rtol=1e-5)
    assert float(full[:, 25:].sum(1).min()) > 0
    assert not cut.lacking_mass().any()


def test_mass_of_lacking_ids_moves_to_the_tail():
    whole, cut = naive.cut(DENSE, 20), naive.cut(DENSE, 20).for_student(25)
    before = torch.logaddexp(whole.logits.logsumexp(1), whole.tail_logsumexp)
    inside = cut.logits.masked_fill(~cut.known, -torch.inf).logsumexp(1)
    torch.testing.assert_close(torch.logaddexp(inside, cut.tail_logsumexp), before)
    assert (cut.known == (whole.ids < 25)).all()
    assert cut.vocabulary == 25


# A cut with lacking ids, so that every field matters.
CUT = naive.with_codes(naive.cut(DENSE, 12), 1).for_student(25)
WITHOUT_MEAN = dataclasses.replace(CUT, tail_mean=None)
TENSORS = [name for name, kind in get_type_hints(TruncatedLogits).items() if "Tensor" in str(kind)]


def assert_equal(found: TruncatedLogits, expected: TruncatedLogits) -> None:
    """In every field of the class."""
    for field in dataclasses.fields(TruncatedLogits):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert torch.equal(a, b), field.name
            assert a.dtype == b.dtype, field.name
        else:
            assert a == b, field.name


def test_every_field_is_a_tensor_or_the_vocabulary():
    """A new field has to be one that `map` reaches, or be considered here and in `joined`."""
    assert {field.name for field in dataclasses.fields(TruncatedLogits)} - set(TENSORS) == {"vocabulary"}
    assert all(isinstance(getattr(CUT, name), torch.Tensor) for name in TENSORS)
    assert not CUT.known.all()


def test_map_reaches_every_tensor():
    seen = []
    changed = CUT.map(lambda tensor: seen.append(id(tensor)) or tensor.flip(0))
    assert sorted(seen) == sorted(id(getattr(CUT, name)) for name in TENSORS)
    for name in TENSORS:
        assert torch.equal(getattr(changed, name), getattr(CUT, name).flip(0)), name
    assert changed.vocabulary == CUT.vocabulary


@pytest.mark.parametrize("chosen", [slice(2, 5), torch.tensor([8, 0, 0]), torch.arange(9) % 2 == 0, slice(0, 0)])
@pytest.mark.parametrize("cut", [CUT, WITHOUT_MEAN], ids=["with a mean", "without"])
def test_rows_reach_every_tensor(cut, chosen):
    some = cut.rows(chosen)
    for name in TENSORS:
        whole = getattr(cut, name)
        assert getattr(some, name) is None if whole is None else torch.equal(getattr(some, name), whole[chosen]), name
    assert some.vocabulary == cut.vocabulary


def test_to_moves_every_tensor():
    assert all(getattr(CUT.to("meta"), name).device.type == "meta" for name in TENSORS)
    assert WITHOUT_MEAN.to("meta").tail_mean is None


@pytest.mark.parametrize("cut", [CUT, WITHOUT_MEAN], ids=["with a mean", "without"])
def test_joined_undoes_rows(cut):
    assert_equal(joined([cut.rows(slice(0, 4)), cut.rows(slice(4, 4)), cut.rows(slice(4, 9))]), cut)
    assert_equal(joined([cut]), cut)


def test_joined_refuses_mixed_parts():
    with pytest.raises(ValueError, match="1 of 2 parts have a tail_mean; expected all or none"):
        joined([CUT, WITHOUT_MEAN])
    with pytest.raises(ValueError, match=r"different k or vocabulary: \[\(12, 25\), \(11, 25\)\]"):
        joined([CUT, CUT.smaller(11)])
    with pytest.raises(ValueError, match=r"different k or vocabulary: \[\(12, 25\), \(12, 24\)\]"):
        joined([CUT, CUT.for_student(24)])


def test_what_needs_no_mean_is_the_same_without_one():
    """Answers are stored without the mean of their tail; nothing else may depend on it."""
    assert WITHOUT_MEAN.is_finite
    for name in ("k", "whole"):
        assert getattr(WITHOUT_MEAN, name) == getattr(CUT, name)
    assert torch.equal(WITHOUT_MEAN.n_tail, CUT.n_tail)
    for method in ("stored_mask", "retained_mass", "lacking_mass"):
        assert torch.equal(getattr(WITHOUT_MEAN, method)(), getattr(CUT, method)()), method
    changes = {
        "map": lambda cut: cut.map(torch.clone),
        "rows": lambda cut: cut.rows(slice(1, 4)),
        "to": lambda cut: cut.to("cpu"),
        "smaller": lambda cut: cut.smaller(5),
        "at_temperature": lambda cut: cut.at_temperature(2.0),
        "for_student": lambda cut: cut.for_student(20),
        "joined": lambda cut: joined([cut, cut]),
    }
    for name, change in changes.items():
        expected = change(CUT)
        assert expected.tail_mean is not None, name
        assert_equal(change(WITHOUT_MEAN), dataclasses.replace(expected, tail_mean=None))
    assert WITHOUT_MEAN.top_logits().tail_mean is None


@pytest.mark.parametrize("field", ["logits", "tail_mean"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_found(field, bad):
    cut = naive.cut(DENSE, 12)
    assert cut.is_finite
    assert naive.cut(DENSE, V).is_finite, "a tail_logsumexp of -inf is an empty tail"
    values = getattr(cut, field).clone()
    values[4] = bad
    assert not dataclasses.replace(cut, **{field: values}).is_finite


@pytest.mark.parametrize("k", [1, 12, V])
def test_a_record_and_back(k):
    """`of` and `top_logits` undo each other where the student lacks nothing."""
    cut = naive.cut(DENSE, k)
    top = cut.top_logits()
    assert [array.dtype for array in (top.ids, top.logits, top.tail_logsumexp, top.tail_mean)] == [np.int32] + 3 * [np.float32]  # fmt: skip
    assert (len(top), top.k) == (9, k)
    assert_equal(TruncatedLogits.of(top, V), cut)
    np.testing.assert_allclose(top.retained_mass(), cut.retained_mass().numpy(), rtol=1e-5)
    without = cut.top_logits(mean=False)
    assert without.tail_mean is None
    assert_equal(TruncatedLogits.of(without, V), dataclasses.replace(cut, tail_mean=None))


def test_top_logits_round_nothing_that_a_record_holds():
    """float32 stays, and numbers of a lower precision become float32 with the same value."""
    half = naive.cut(DENSE, 12).map(lambda tensor: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor)
    top = half.top_logits()
    assert top.logits.dtype == np.float32
    assert np.array_equal(top.logits, half.logits.float().numpy())
    assert isinstance(top, TopLogits)
