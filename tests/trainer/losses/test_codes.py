"""Divergences whose tail is read from codes, against sums over all ids of a t̂ that is built densely in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from emkd.trainer.losses.divergence import KINDS, Divergence
from emkd.vlm.codes import Codes, dense_logits
from tests.trainer import naive
from tests.trainer.losses.test_losses import V, logits

BASIS = naive.basis(0, V)
CODES = Codes(BASIS, "cpu")


def exact(kind, student, teacher_logits, temperature=1.0):
    """Of logits [n, V] in float64."""
    log_p = (student / temperature).log_softmax(1)
    log_t = (teacher_logits / temperature).log_softmax(1)
    p, t = log_p.exp(), log_t.exp()
    log_m = ((p + t) / 2).log()
    return (
        temperature**2
        * {
            "reverse_kl": (p * (log_p - log_t)).sum(1),
            "forward_kl": (t * (log_t - log_p)).sum(1),
            "jsd": ((p * (log_p - log_m)).sum(1) + (t * (log_t - log_m)).sum(1)) / 2,
        }[kind]
    )


def compare(divergence, student, teacher, expected, codes=CODES):
    """Values and gradients, of tokens with different weights; `expected` is of a float64 leaf `student`."""
    single = student.detach().float().requires_grad_()
    weights = torch.arange(1.0, len(single) + 1)
    found = divergence(single, teacher, codes)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=3e-6 * max(1, divergence.temperature**2))
    (gradient,) = torch.autograd.grad((weights * found).sum(), single)
    (reference,) = torch.autograd.grad((weights * expected).sum(), student)
    assert float((gradient.double() - reference).norm()) <= 2e-5 * float(reference.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_teacher_with_codes(kind, k, temperature):
    teacher = naive.with_codes(naive.cut(logits(2), k), 3)
    student = logits(1).double().requires_grad_()
    expected = exact(kind, student, naive.t_hat(teacher, BASIS), temperature)
    compare(Divergence(kind=kind, tail="codes", temperature=temperature), student, teacher, expected)


@pytest.mark.parametrize("k", [5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_the_student_lacks_leave_their_mass_to_the_tail(kind, k):
    dense = logits(2)
    dense[:, 35:] += 5
    teacher = naive.with_codes(naive.cut(dense, k), 3).for_student(35)
    assert (~teacher.known).any()
    student = logits(1)[:, :35].double().requires_grad_()
    compare(Divergence(kind=kind, tail="codes"), student, teacher, exact(kind, student, naive.t_hat(teacher, BASIS)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_with_a_softcap_are_read_with_it(kind):
    basis = replace(BASIS, cap=1.5)
    codes, teacher = Codes(basis, "cpu"), naive.with_codes(naive.cut(1.5 * torch.tanh(logits(2)), 5), 3)
    read = naive.read(teacher, basis)
    torch.testing.assert_close(codes.logits(teacher.codes).double(), read, rtol=1e-5, atol=1e-5)
    assert float(read.abs().max()) <= 1.5 < float(naive.read(teacher, BASIS).abs().max())
    student = logits(1).double().requires_grad_()
    compare(
        Divergence(kind=kind, tail="codes"), student, teacher, exact(kind, student, naive.t_hat(teacher, basis)), codes
    )
    with pytest.raises(ValueError, match="no linear function of codes"):
        codes.over(torch.arange(4))


def test_dense_logits_keep_what_is_stored():
    teacher = naive.with_codes(naive.cut(logits(2), 5), 3)
    found = dense_logits(teacher, CODES)
    torch.testing.assert_close(found.gather(1, teacher.ids), teacher.logits, rtol=0, atol=0)
    rest = found.scatter(1, teacher.ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(rest, teacher.tail_logsumexp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), naive.t_hat(teacher, BASIS), rtol=1e-4, atol=1e-4)


def test_a_teacher_whose_logits_are_all_stored_needs_no_codes():
    teacher = naive.cut(logits(2), V)
    found = Divergence(tail="codes")(logits(1), teacher, None)
    torch.testing.assert_close(
        found.double(), exact("reverse_kl", logits(1).double(), logits(2).double()), rtol=1e-5, atol=1e-5
    )


def test_codes_without_a_basis_are_an_error():
    with pytest.raises(ValueError, match="needs a basis"):
        Divergence(tail="codes")(logits(1), naive.with_codes(naive.cut(logits(2), 5), 3), None)


def test_errors_fall_in_proportion_to_the_step():
    """Losses and gradients of three steps, each a quarter of the one before, against the dense teacher."""
    basis, r = naive.basis(0, V), 6
    coefficients = torch.randn(40, r, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    head = torch.from_numpy(basis.head).double()
    dense = coefficients @ head.T + torch.from_numpy(basis.offset).double()
    student = (
        dense + torch.randn(40, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ).requires_grad_()
    expected = exact("reverse_kl", student, dense)
    (reference,) = torch.autograd.grad(expected.sum(), student)
    errors = []
    for step in (0.4, 0.1, 0.025):
        codes = Codes(replace(basis, step=step), "cpu")
        teacher = replace(naive.cut(dense.float(), 4), codes=(coefficients / step).round().to(torch.int16))
        single = student.detach().float().requires_grad_()
        found = Divergence(tail="codes")(single, teacher, codes)
        (gradient,) = torch.autograd.grad(found.sum(), single)
        loss_error = float((found.detach().double() - expected.detach()).norm())
        errors.append((loss_error, float((gradient.double() - reference).norm() / reference.norm())))
    for coarse, fine in itertools.pairwise(errors):
        for before, after in zip(coarse, fine, strict=True):
            assert 2.5 < before / after < 6.5, errors
    assert errors[-1][1] < 0.02


def test_codes_are_made_in_the_order_that_storage_has_them():
    """To transpose them afterwards takes as long as to compress them."""
    hidden = torch.randn(50, len(BASIS.mean), generator=torch.Generator().manual_seed(0))
    assert CODES.encode(hidden).T.is_contiguous()
