import pytest
import torch

from emkd.vlm.truncated import TruncatedLogits
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
