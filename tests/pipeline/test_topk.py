import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emkd.pipeline.topk import (
    _has_core_to_spare,
    _tail_in_one_kernel,
    _tail_in_place,
    top_k,
    top_k_in_chunks,
)
from emkd.vlm.truncated import TruncatedLogits, truncated


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
    """Few levels make ties everywhere, also at rank k."""
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


def as_before(logits: torch.Tensor, k: int, round_to: torch.dtype) -> TruncatedLogits:
    """Every step over all of V, with a mask: how it was done when the first caches were made."""
    stored = logits.to(round_to).float()
    keep = torch.ones_like(stored, dtype=torch.bool)
    if k < logits.shape[1]:
        threshold = stored.topk(k, dim=1).values[:, -1:]
        above, level = stored > threshold, stored == threshold
        keep = above | (level & (level.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    ids = keep.nonzero()[:, 1].reshape(len(logits), k)
    values = stored.gather(1, ids)
    order = values.argsort(dim=1, descending=True, stable=True)
    rest = logits.double().masked_fill(keep, -torch.inf).logsumexp(dim=1)
    mean = logits.double().masked_fill(keep, 0).sum(dim=1) / max(1, logits.shape[1] - k)
    return truncated(ids.gather(1, order), values.gather(1, order), rest, logits.shape[1], mean)


def assert_same(found: TruncatedLogits, expected: TruncatedLogits, scale: float) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logits, expected.logits)
    assert found.tail_logsumexp.dtype == found.tail_mean.dtype == torch.float32
    torch.testing.assert_close(found.tail_logsumexp.double(), expected.tail_logsumexp.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.tail_mean.double(), expected.tail_mean.double(), rtol=1e-6, atol=1e-6 * scale)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    v=st.integers(1, 200),
    k=st.integers(1, 20),
    block=st.integers(1, 9),
    levels=st.integers(1, 40),
    offset=st.integers(-40, 20),
)
def test_blocks_do_not_change_anything(seed, v, k, block, levels, offset):
    """Any size of blocks, ids after the last whole block, ties within and between blocks, negative numbers, zeros."""
    values = torch.randint(0, levels, (4, v), generator=torch.Generator().manual_seed(seed)) + offset
    logits, k = values.float() * 0.5, min(k, v)
    assert_same(top_k(logits, k, block=block), as_before(logits, k, torch.float32), 20)


@pytest.mark.parametrize("round_to", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [40_000, 40_037])
def test_a_large_vocabulary(v, dtype, round_to):
    """More than half of the rows in bfloat16 tie at rank k; columns beyond V belong to other data."""
    logits = 3 * torch.randn(20, v + 5, generator=torch.Generator().manual_seed(3))
    logits = logits.to(dtype)[:, :v]
    before = logits.clone()
    found = top_k(logits, 64, round_to)
    assert torch.equal(logits, before), "the caller's logits stay"
    assert_same(found, as_before(logits.float(), 64, round_to), 3)


def test_zeros_of_both_signs_are_one_number():
    logits = torch.tensor([[-1.0, 0.0, -0.0, 0.0, -0.0, 1e-45, -1e-45]])
    assert top_k(logits, 4).ids.tolist() == [[5, 1, 2, 3]]
    assert top_k(logits, 4, torch.bfloat16).ids.tolist() == [[1, 2, 3, 4]], "the smallest numbers round to zero"


@pytest.mark.parametrize("gap", [0.0, 30.0, 200.0, 1e5])
def test_a_tail_far_below_what_is_stored(gap):
    """As the logsumexp of all logits minus that of the stored logits, it would cancel."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(4))
    logits[:, 100:108] += gap
    assert_same(top_k(logits, 8, block=16), as_before(logits, 8, torch.float32), 3)


def test_the_tail_as_a_gpu_takes_it():
    logits = 3 * torch.randn(4, 3000, generator=torch.Generator().manual_seed(5))
    first = logits.argmax(dim=1, keepdim=True)
    expected = logits.double().logsumexp(dim=1)
    for dtype in (torch.float32, torch.bfloat16):
        some = logits.to(dtype)
        found = _tail_in_one_kernel(some, first, some.gather(1, first).float())
        torch.testing.assert_close(found.double(), some.double().logsumexp(dim=1), rtol=1e-6, atol=1e-6)
    found = _tail_in_place(logits.clone(), logits.gather(1, first))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 7, 2500, 2999])
@pytest.mark.parametrize("k", [8, 3000])
def test_what_is_not_finite_shows(value, place, k):
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(6))
    assert top_k(logits, k, block=16).is_finite
    logits[2, place] = value
    found = top_k(logits, k, block=16)
    assert not found.is_finite
    for row in (0, 1, 3):
        assert found.logits[row].isfinite().all()


def test_what_rounds_to_infinity_shows():
    logits = torch.randn(2, 3000)
    logits[1, 5] = 70_000.0
    assert top_k(logits, 8).is_finite
    assert not top_k(logits, 8, torch.float16).is_finite


@pytest.mark.parametrize("n", [257, 600, 1024])
def test_beside_the_head_of_the_next_chunk(n):
    """With a core to spare, in a second thread: the same numbers, at most two chunks alive, errors as they are."""
    if not _has_core_to_spare():
        pytest.skip("one core")
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(n, 6, generator=generator), torch.randn(300, 6, generator=generator)
    alive, most = [], []

    def head(rows):
        made = rows @ weight.T
        alive.append(weakref.ref(made.untyped_storage()))
        most.append(sum(ref() is not None for ref in alive))
        return made

    with torch.inference_mode():
        found = top_k_in_chunks(hidden, head, 5, torch.float32, 256)
    logits = torch.cat([rows @ weight.T for rows in hidden.split(256)])
    assert_same(found, as_before(logits, 5, torch.float32), 3)
    assert max(most) <= 2
    assert len(most) == -(-n // 256)
    assert all(not thread.name.startswith("emkd-top-k") for thread in threading.enumerate())

    def full(rows):
        if len(most) == 1:
            torch.empty(1 << 50)
        most.append(None)
        return rows @ weight.T

    most.clear()
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        top_k_in_chunks(hidden, full, 5, torch.float32, 256)
    assert all(not thread.name.startswith("emkd-top-k") for thread in threading.enumerate())
