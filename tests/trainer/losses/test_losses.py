import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emkd.trainer.losses.divergence import supervised, vlad
from emkd.trainer.losses.reverse_kl import reverse_kl
from tests.trainer import naive

V = 40

TAILS = ("bucket", "uniform")


def logits(seed: int, n: int = 12, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 5, 39, 40])
@pytest.mark.parametrize("tail", TAILS)
def test_reverse_kl_of_a_cut_teacher_is_the_naive_one(k, tail):
    student, teacher = logits(1), naive.cut(logits(2), k)
    found, expected = reverse_kl(student, teacher, tail), naive.reverse_kl(student, teacher, tail)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_its_gradient_is_the_naive_one(tail):
    student, teacher = logits(1).requires_grad_(), naive.cut(logits(2), 5)
    (found,) = torch.autograd.grad(reverse_kl(student, teacher, tail).sum(), student)
    (expected,) = torch.autograd.grad(naive.reverse_kl(student, teacher, tail).sum(), student)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_cut_is_the_true_kl(tail):
    student, dense = logits(1), logits(2)
    expected = torch.nn.functional.kl_div(
        dense.double().log_softmax(1), student.double().log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    torch.testing.assert_close(reverse_kl(student, naive.cut(dense, V), tail).double(), expected, rtol=1e-6, atol=1e-6)


def test_bucket_is_a_lower_bound_of_the_true_kl():
    student, dense = logits(1), logits(2)
    true = reverse_kl(student, naive.cut(dense, V), "bucket")
    found = reverse_kl(student, naive.cut(dense, 5), "bucket")
    assert (found <= true + 1e-5).all()
    assert (found < true - 1e-2).any()


# Confidence: the likeliest logit is raised by up to 60, where 1 - Σp is zero or negative in float32.
confidence = st.floats(0, 60)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, V), up=confidence, tail=st.sampled_from(TAILS))
def test_never_negative(seed, k, up, tail):
    dense, student = logits(seed), logits(seed + 1)
    dense[:, 3] += up
    student[:, 3] += up
    teacher = naive.cut(dense, k)
    assert (reverse_kl(student, teacher, tail) >= -2e-6).all()
    assert (naive.reverse_kl(student, teacher, tail) >= -1e-12).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, V), up=confidence)
def test_equal_distributions_have_none(seed, k, up):
    dense = logits(seed)
    dense[:, 3] += up
    assert reverse_kl(dense, naive.cut(dense, k), "bucket").abs().max() < 2e-6
    assert reverse_kl(dense, naive.cut(dense, V), "uniform").abs().max() < 2e-6


def test_uniform_tail_is_exact_where_the_tail_is_uniform():
    dense = logits(5)
    order = dense.argsort(1, descending=True)
    dense.scatter_(1, order[:, 5:], -4.0)
    assert reverse_kl(dense, naive.cut(dense, 5), "uniform").abs().max() < 2e-6


def test_a_confident_teacher_keeps_its_tail():
    """Mass 2e-8: computed as 1 - Σp in float32 it is lost, and with it this loss."""
    dense, student = torch.zeros(1, V), torch.zeros(1, V)
    dense[0, 0], student[0, 0] = 21.5, 15.0
    teacher = naive.cut(dense, 1)
    mass = float(naive.probabilities(teacher)[2])
    assert 1e-8 < mass < 3e-8
    expected = naive.reverse_kl(student, teacher, "bucket")
    torch.testing.assert_close(reverse_kl(student, teacher, "bucket").double(), expected, rtol=1e-2, atol=0)
    assert float(expected) > 5e-5


@pytest.mark.parametrize("tail", TAILS)
def test_ids_that_the_student_lacks_are_in_the_tail(tail):
    dense = logits(2)
    dense[:, 35:] += 5  # among the stored ones, and partly all of them
    teacher = naive.cut(dense, 5).for_student(35)
    assert (~teacher.known).any()
    student = logits(1)[:, :35].requires_grad_()
    found, expected = reverse_kl(student, teacher, tail), naive.reverse_kl(student, teacher, tail)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.isfinite().all()


def test_no_ids_of_the_student_stored_at_all():
    dense = logits(2)
    dense[:, 30:] += 50
    teacher = naive.cut(dense, 5).for_student(30)
    assert not teacher.known.any()
    student = logits(1)[:, :30]
    torch.testing.assert_close(
        reverse_kl(student, teacher, "uniform").double(), naive.reverse_kl(student, teacher, "uniform"),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_no_tokens_are_no_loss():
    teacher = naive.cut(logits(2), 5).rows(slice(0, 0))
    assert reverse_kl(logits(1)[:0], teacher, "uniform").sum() == 0


def test_vlad_is_the_mean_smooth_l1():
    student, teacher = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.25, 1.0]])
    assert float(vlad(student, teacher)) == pytest.approx((0.5 * 0.25**2 + (2.0 - 0.5)) / 2)


def test_supervised_is_a_sum():
    scores = logits(1)[:3]
    expected = -sum(float(scores[i].double().log_softmax(0)[i]) for i in range(3))
    assert float(supervised(scores, torch.arange(3))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_a_large_vocabulary_costs_no_precision(tail):
    """Sums over 150 thousand ids: added up one after the other in float32 they are off by 1e-4."""
    generator = torch.Generator().manual_seed(0)
    student, dense = (3 * torch.randn(4, 151_936, generator=generator) for _ in range(2))
    teacher = naive.cut(dense, 64)
    found, expected = [], []
    for leaf, loss, store in ((student, reverse_kl, found), (student.double(), naive.reverse_kl, expected)):
        leaf = leaf.clone().requires_grad_()
        value = loss(leaf, teacher, tail)
        store += [value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()]
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())
