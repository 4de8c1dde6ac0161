"""The divergences of VSD and RLD, against sums over all ids in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emkd.trainer.losses.divergence import KINDS, Divergence
from emkd.vlm.truncated import TruncatedLogits
from tests.trainer import naive
from tests.trainer.losses.test_losses import V, confidence, logits

TAILS = ("bucket", "uniform")  # of a teacher without codes; test_codes.py has the tail codes


def compare(divergence: Divergence, student: torch.Tensor, teacher: TruncatedLogits, expected: torch.Tensor) -> None:
    """Values and gradients, of tokens with different weights; `expected` is of a float64 leaf `student`."""
    single = student.detach().float().requires_grad_()
    weights = torch.arange(1.0, len(single) + 1)
    found = divergence(single, teacher)
    atol = 2e-6 * max(1, divergence.temperature**2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=atol)
    (gradient,) = torch.autograd.grad((weights * found).sum(), single)
    (reference,) = torch.autograd.grad((weights * expected).sum(), student)
    assert float((gradient.double() - reference).norm()) <= 1e-5 * float(reference.norm())


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_teacher(kind, tail, k):
    student, teacher = logits(1).double().requires_grad_(), naive.cut(logits(2), k)
    compare(Divergence(kind=kind, tail=tail), student, teacher, naive.divergence(kind, student, teacher, tail))


@pytest.mark.parametrize("k", [5, V])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_the_student_lacks_are_in_the_tail(kind, tail, k):
    """At k = V there is no tail for their mass: what is left is the teacher's choice among the student's ids."""
    dense = logits(2)
    dense[:, 35:] += 5
    teacher = naive.cut(dense, k).for_student(35)
    assert (~teacher.known).any()
    student = logits(1)[:, :35].double().requires_grad_()
    expected = naive.divergence(kind, student, teacher, tail)
    assert (expected >= -1e-12).all()
    compare(Divergence(kind=kind, tail=tail), student, teacher, expected)
    if k == V:
        among = naive.divergence(kind, student, naive.cut(dense[:, :35], 35), tail)
        torch.testing.assert_close(expected, among, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_cut_is_the_true_one(kind, tail):
    student, dense = logits(1).double(), logits(2)
    p, t = student.softmax(1), dense.double().softmax(1)
    m = (p + t) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum(1)

    expected = {"reverse_kl": kl(p, t), "forward_kl": kl(t, p), "jsd": (kl(p, m) + kl(t, m)) / 2}[kind]
    found = Divergence(kind=kind, tail=tail)(student.float(), naive.cut(dense, V))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), k=st.integers(1, V), up=confidence,
    tail=st.sampled_from(TAILS), kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_never_negative_and_always_finite(seed, k, up, tail, kind):
    dense, student = logits(seed), logits(seed + 1)
    dense[:, 3] += up
    student[:, 3] += up
    student.requires_grad_()
    found = Divergence(kind=kind, tail=tail)(student, naive.cut(dense, k))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert (found >= -2e-6).all()
    assert gradient.isfinite().all()
    if kind == "jsd":
        assert (found <= math.log(2) + 1e-6).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
def test_temperature_divides_all_logits_of_an_even_tail(kind, temperature):
    """If the teacher's tail is even, the stored numbers are enough: the result is that of all logits divided by T."""
    dense = logits(2)
    order = dense.argsort(1, descending=True)
    dense = dense.scatter(1, order[:, 5:], dense.gather(1, order[:, 4:5]).expand(-1, V - 5) - 1)
    student = logits(1).double().requires_grad_()
    whole = naive.cut(dense / temperature, V)
    expected = temperature**2 * naive.divergence(kind, student / temperature, whole, "uniform")
    compare(Divergence(kind=kind, temperature=temperature), student, naive.cut(dense, 5), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_where_nothing_is_cut(kind):
    student, dense = logits(1).double().requires_grad_(), logits(2)
    expected = 9 * naive.divergence(kind, student / 3, naive.cut(dense / 3, V), "uniform")
    compare(Divergence(kind=kind, temperature=3.0), student, naive.cut(dense, V), expected)


def test_temperature_without_a_tail_model_is_refused():
    with pytest.raises(ValueError, match="temperature 2 needs the tail codes or uniform.*total mass at temperature 1"):
        Divergence(tail="bucket", temperature=2.0)


@pytest.mark.parametrize("given", [{"kind": "tv"}, {"tail": "none"}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_unknown_ones_are_refused(given):
    with pytest.raises(ValueError, match="divergence"):
        Divergence(**given)
