"""The basis of codes: its predicted error is the one there is, and its columns are principal components."""

import numpy as np
import pytest
import torch

from emkd.errors import SampleError, UsageError
from emkd.pipeline.basis import Moments, Spectrum, head_metric
from emkd.storage.arrays.frames import encode_frame
from emkd.vlm.after_head import NOTHING, AfterHead
from emkd.vlm.codes import Codes

D, V = 24, 90


def states(n, seed=0, spread=1.2):
    """Correlated hidden states whose directions fall off in size."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(D, D)) * spread ** -np.arange(D)
    return torch.from_numpy(rng.normal(size=(n, D)) @ mix.T + 3).float()


def head(seed=1, bias=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, D, generator=generator), torch.randn(V, generator=generator) if bias else None


def spectrum(weight, n=4000):
    return Spectrum.of([Moments.of(states(n, 0)), Moments.of(states(n, 1))], head_metric(weight))


def test_moments_are_those_of_all_rows_together():
    a, b = states(50, 0), states(70, 1)
    found, both = Moments.of(a) + Moments.of(b), torch.cat([a, b]).double()
    torch.testing.assert_close(found.mean, both.mean(0))
    torch.testing.assert_close(found.covariance(found.mean), torch.cov(both.T, correction=0), rtol=1e-8, atol=1e-8)


def test_the_metric_is_that_of_the_rows_of_the_head():
    weight, _ = head()
    torch.testing.assert_close(head_metric(weight), weight.double().T @ weight.double() / V, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("after", [AfterHead(scale=0.2), AfterHead(cap=6.0), AfterHead(scale=3.0, cap=6.0)], ids=str)
def test_what_follows_the_head_is_in_the_logits_and_the_prediction(after):
    """A scale changes the prediction with the logits; with a softcap, the prediction is an upper bound."""
    weight, bias = head()
    halves = [Moments.of(states(4000, seed)) for seed in (0, 1)]
    found = Spectrum.of(halves, after.scale**2 * head_metric(weight))
    basis = found.basis(found.at_error(0.3, D), weight, bias, after)
    assert (basis.cap, basis.logit_error) == (after.cap, 0.3)
    unseen = states(2000, 7)
    exact = after.scale * (unseen.double() @ weight.double().T + bias.double())
    exact = exact if after.cap is None else after.cap * torch.tanh(exact / after.cap)
    codes = Codes(basis, "cpu")
    measured = float((codes.logits(codes.encode(unseen)).double() - exact).pow(2).mean().sqrt())
    assert measured <= 1.1 * 0.3
    assert measured >= (0.85 if after.cap is None else 0.05) * 0.3


def test_nothing_behind_the_head_leaves_the_basis_as_it_was():
    weight, bias = head()
    found = spectrum(weight)
    cut = found.at_error(0.5, D)
    assert found.basis(cut, weight, bias).to_bytes() == found.basis(cut, weight, bias, NOTHING).to_bytes()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("error", [2.0, 0.5, 0.1])
def test_the_predicted_error_is_the_one_there_is(error, bias):
    """On states that the basis has not seen, in float64; never more than predicted, and not far less if it is small."""
    weight, offset = head(bias=bias)
    found = spectrum(weight)
    cut = found.at_error(error, D)
    basis = found.basis(cut, weight, offset)
    unseen = states(2000, 7)
    exact = unseen.double() @ weight.double().T + (0 if offset is None else offset.double())
    codes = Codes(basis, "cpu")
    measured = float((codes.logits(codes.encode(unseen)).double() - exact).pow(2).mean().sqrt())
    assert measured <= 1.1 * error
    assert measured >= (0.85 if error <= 0.5 else 0.3) * error
    assert basis.logit_error == error


def test_a_smaller_error_keeps_more_columns_and_takes_more_bytes():
    weight, _ = head()
    found, unseen = spectrum(weight), states(2000, 7)
    sizes, columns = [], []
    for error in (2.0, 0.5, 0.1):
        basis = found.basis(found.at_error(error, D), weight, None)
        sizes.append(len(encode_frame(Codes(basis, "cpu").encode(unseen).numpy(), basis.groups)))
        columns.append(sum(basis.groups))
    assert sizes == sorted(sizes)
    assert columns == sorted(columns)
    assert columns[0] < D


def test_columns_are_uncorrelated_and_descend():
    weight, _ = head()
    found = spectrum(weight)
    seen = torch.cat([states(4000, 0), states(4000, 1)]).double()
    coefficients = (seen - found.mean) @ found.projection
    covariance = torch.cov(coefficients.T, correction=0)
    torch.testing.assert_close(covariance.diagonal(), found.variance, rtol=1e-6, atol=1e-8)
    off = covariance - torch.diag(covariance.diagonal())
    assert float(off.abs().max()) < 1e-6 * float(found.variance[0])
    assert (found.variance.diff() <= 1e-12).all()


def test_all_columns_give_the_state_back():
    weight, _ = head()
    found = spectrum(weight)
    product = found.projection @ found.reconstruction.T
    torch.testing.assert_close(product, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)


def test_few_rows_do_not_make_the_prediction_too_good():
    """From 12 tokens in 24 dimensions most columns seem not to vary: the prediction counts what unseen rows lose."""
    weight, _ = head()
    found = Spectrum.of([Moments.of(states(6, 0)), Moments.of(states(6, 1))], head_metric(weight))
    basis = found.basis(found.at_error(0.5, D), weight, None)
    codes, unseen = Codes(basis, "cpu"), states(2000, 7)
    measured = float((codes.logits(codes.encode(unseen)) - unseen @ weight.T).pow(2).mean().sqrt())
    assert measured <= 1.1 * 0.5


def test_one_row_alone_drops_no_column():
    """It says nothing about other rows, so all columns stay, and the error holds for any."""
    weight, _ = head()
    found = Spectrum.of([Moments.of(states(12))], head_metric(weight))
    cut = found.at_error(0.5, D)
    assert cut.n_columns == D
    codes, unseen = Codes(found.basis(cut, weight, None), "cpu"), states(2000, 7)
    assert float((codes.logits(codes.encode(unseen)) - unseen @ weight.T).pow(2).mean().sqrt()) <= 1.1 * 0.5


def test_memory_that_allows_too_few_columns_is_refused():
    weight, _ = head()
    found = spectrum(weight)
    least = found.least_error(3)
    assert found.at_error(1.01 * least, 3).n_columns == 3
    with pytest.raises(UsageError, match="takes more than the 3 columns.*--head-memory"):
        found.at_error(0.5 * least, 3)


def test_groups_join_columns_of_similar_spread():
    weight, _ = head()
    found = spectrum(weight)
    cut = found.at_error(0.1, D)
    groups = found.groups(cut)
    assert sum(groups) == cut.n_columns
    spread, first = found.variance[: cut.n_columns].sqrt() / cut.step, 0
    for size in groups[:-1]:
        some = spread[first : first + size]
        assert float(some.max() / some.min()) <= 2**0.5 + 1e-9
        first += size


def test_a_state_far_outside_is_an_error_of_its_row():
    weight, _ = head()
    found = spectrum(weight)
    codes = Codes(found.basis(found.at_error(0.1, D), weight, None), "cpu")
    with pytest.raises(SampleError, match="needs a code of .* at most 32767 fits; use a larger --logit-error"):
        codes.encode(1e6 * states(3))
    with pytest.raises(SampleError, match="not-finite"):
        codes.encode(states(3) * float("nan"))


def test_hidden_states_come_back_for_affinities():
    weight, _ = head()
    found = spectrum(weight)
    basis = found.basis(found.at_error(0.01, D), weight, None)
    codes, unseen = Codes(basis, "cpu"), states(50, 7)
    q = codes.encode(unseen)
    torch.testing.assert_close(codes.hidden(q), unseen, rtol=0, atol=0.05)
    expected = torch.nn.functional.cosine_similarity(unseen[:5, None], unseen[None, 5:], dim=2)
    np.testing.assert_allclose(basis.affinity(q[:5].numpy(), q[5:].numpy()), expected, atol=2e-3)
    np.testing.assert_allclose(basis.hidden(q.numpy()), codes.hidden(q), rtol=1e-4, atol=1e-4)
