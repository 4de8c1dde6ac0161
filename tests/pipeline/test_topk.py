import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emkd.pipeline.topk import top_k, top_k_in_chunks


def naive(logits: torch.Tensor, k: int):
    """By Python's sort: descending, ties by the smaller id; tails in float64."""
    ids, kept, tails, means = [], [], [], []
    for row in logits.tolist():
        order = sorted(range(len(row)), key=lambda v: (-row[v], v))
        ids.append(order[:k])
        kept.append([row[v] for v in order[:k]])
        rest = torch.tensor([row[v] for v in order[k:]], dtype=torch.float64)
        tails.append(rest.logsumexp(0) if len(rest) else torch.tensor(-torch.inf, dtype=torch.float64))
        means.append(rest.mean() if len(rest) else torch.tensor(0.0, dtype=torch.float64))
    return torch.tensor(ids), torch.tensor(kept), torch.stack(tails), torch.stack(means)


def check(logits: torch.Tensor, k: int) -> None:
    found = top_k(logits, k)
    ids, kept, tails, means = naive(logits, k)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.logits, kept)
    torch.testing.assert_close(found.tail_logsumexp.double(), tails, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.tail_mean.double(), means, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 5),
    v=st.integers(1, 30),
    k=st.integers(1, 30),
    levels=st.integers(1, 9),
)
def test_ties_go_to_the_smaller_id(seed, n, v, k, levels):
    """Few levels make ties everywhere, the k-th place included."""
    logits = torch.randint(0, levels, (n, v), generator=torch.Generator().manual_seed(seed)).float()
    check(logits, min(k, v))


@pytest.mark.parametrize("k", [1, 8, 63, 64])
def test_distinct_logits(k):
    check(3 * torch.randn(20, 64, generator=torch.Generator().manual_seed(1)), k)


def test_what_is_rounded_decides_what_is_stored():
    """1.001 and 1.002 are one bfloat16: the smaller id is stored, and the tail is of the exact numbers."""
    logits = torch.tensor([[0.0, 1.001, 1.002, -2.0]])
    found = top_k(logits, 1, torch.bfloat16)
    assert found.ids.tolist() == [[1]]
    assert found.logits.tolist() == [[1.0]]
    expected = torch.tensor([0.0, 1.002, -2.0], dtype=torch.float64).logsumexp(0)
    assert float(found.tail_logsumexp) == pytest.approx(float(expected), rel=1e-6)


def test_a_confident_token_keeps_its_tail():
    logits = torch.zeros(1, 40)
    logits[0, 0] = 40.0
    assert float(top_k(logits, 1).tail_logsumexp) == pytest.approx(float(torch.tensor(39.0).log()), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_do_not_change_anything(chunk):
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(7, 6, generator=generator), torch.randn(40, 6, generator=generator)
    found = top_k_in_chunks(hidden, lambda rows: rows @ head.T, 5, torch.float32, chunk)
    whole = top_k(hidden @ head.T, 5)
    assert torch.equal(found.ids, whole.ids)
    torch.testing.assert_close(found.logits, whole.logits)
    torch.testing.assert_close(found.tail_logsumexp, whole.tail_logsumexp)


def test_no_tokens_at_all():
    found = top_k_in_chunks(torch.zeros(0, 6), lambda rows: rows @ torch.zeros(6, 40), 5, torch.float32, 3)
    assert found.ids.shape == found.logits.shape == (0, 5)
    assert found.tail_logsumexp.shape == found.tail_mean.shape == (0,)
