"""What matching compares: spaces and cuts, with codes and without, against distances written out in float64."""

from dataclasses import replace

import pytest
import torch

from emkd.trainer.matching import cost as module
from emkd.trainer.matching.cost import SPACES, Cost, assignment_cost, matching_cost
from emkd.vlm.codes import Codes
from emkd.vlm.head import LMHead
from tests.trainer import naive
from tests.trainer.matching.test_match import V, tokens

BASIS = naive.basis(1, V)
CODES = Codes(BASIS, "cpu")


def manhattan(student, teacher):
    """[Ns, Nt] of float64 logits [Ns, V], [Nt, V]"""
    return torch.stack([(row - teacher).abs().sum(1) for row in student])


def log_z(teacher):
    """Of all logits of the teacher, [n, 1] float64."""
    stored = teacher.logits.double().masked_fill(~teacher.known, -torch.inf).logsumexp(1)
    return torch.logaddexp(stored, teacher.tail_logsumexp.double())[:, None]


@pytest.mark.parametrize(("n_student", "n_teacher"), [(4, 16), (16, 4)])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_with_codes_the_cost_is_the_distance_to_what_they_read(cap, space, n_student, n_teacher):
    teacher, basis = naive.with_codes(naive.cut(tokens(2, n_teacher), 8), 3), replace(BASIS, cap=cap)
    student, theirs = tokens(1, n_student), naive.read(teacher, basis)
    ours = student.double()
    if space == "log_probabilities":
        ours, theirs = ours.log_softmax(1), theirs - log_z(teacher)
    found = matching_cost(student, teacher, Cost(space=space), Codes(basis, "cpu"))
    torch.testing.assert_close(found.double(), manhattan(ours, theirs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("n_student", "n_teacher"), [(4, 16), (16, 4)])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_cut_in_the_space_of_log_probabilities(k, n_student, n_teacher, coded):
    """t̂: the k largest log-probabilities, and one constant for all others of the image, their mean."""
    teacher = naive.with_codes(naive.cut(tokens(2, n_teacher), 8), 3)
    teacher = teacher if coded else replace(teacher, codes=None)
    shifted = naive.cut(tokens(2, n_teacher).double().log_softmax(1).float(), k)
    student = tokens(1, n_student)
    found = matching_cost(student, teacher, Cost(space="log_probabilities", top_k=k), CODES if coded else None)
    expected = naive.cost(student.double().log_softmax(1), shifted)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_cut_of_logits_is_that_of_a_shorter_record(k):
    student, teacher = tokens(1, 4), naive.with_codes(naive.cut(tokens(2, 9), 8), 3)
    found = matching_cost(student, teacher, Cost(top_k=k), CODES)
    torch.testing.assert_close(found.double(), naive.cost(student, naive.cut(tokens(2, 9), k)), rtol=1e-5, atol=1e-3)


def test_ids_that_the_student_lacks_do_not_count():
    teacher = naive.with_codes(naive.cut(tokens(2, 9), 8), 3).for_student(45)
    student = tokens(1, 4)[:, :45]
    found = matching_cost(student, teacher, Cost(), CODES)
    torch.testing.assert_close(
        found.double(), manhattan(student.double(), naive.read(teacher, BASIS)), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("top_k", [None, 4])
def test_from_hidden_states(space, top_k):
    """The head's rows beyond V are padding, and it has a bias."""
    generator = torch.Generator().manual_seed(5)
    head = LMHead(
        weight=torch.randn(V + 4, 6, generator=generator), bias=torch.randn(V + 4, generator=generator), n_tokens=V
    )
    hidden = torch.randn(16, 6, generator=generator)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)[:, :V]
    teacher = naive.with_codes(naive.cut(tokens(2, 7), 8), 3)
    found = assignment_cost(hidden, head, teacher, Cost(space=space, top_k=top_k), CODES)
    torch.testing.assert_close(
        found, matching_cost(logits, teacher, Cost(space=space, top_k=top_k), CODES), rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("n_student", "n_teacher"), [(4, 9), (9, 4)])
@pytest.mark.parametrize("cap", [None, 2.0, 1e6])
def test_a_large_vocabulary_takes_moments_over_a_sample(monkeypatch, cap, space, n_student, n_teacher):
    """The formula in float64 over the same ids, and near the distance over all ids."""
    v = 6000
    generator = torch.Generator().manual_seed(0)
    basis, dense = replace(naive.basis(1, v), cap=cap), torch.randn(n_teacher, v, generator=generator)
    teacher = naive.with_codes(naive.cut(dense, 8), 3)
    student = 2 * torch.randn(n_student, v, generator=generator) + torch.randn(n_student, 1, generator=generator)
    monkeypatch.setattr(module, "SAMPLED", 3000)
    monkeypatch.setattr(module, "LOGITS", 3 * 3000)
    module._sample.cache_clear()
    ids = module._sample(v, torch.device("cpu"))
    assert len(ids.unique()) == 3000
    codes = Codes(basis, "cpu")
    found = matching_cost(student, teacher, Cost(space=space), codes)
    ours, theirs = student.double(), naive.read(teacher, basis)
    if space == "log_probabilities":
        ours, theirs = ours.log_softmax(1), theirs - log_z(teacher)
    difference = ours[:, None, ids] - theirs[None, :, ids]
    mean, deviation = difference.mean(2), difference.std(2, correction=0)
    normal = torch.distributions.Normal(0, 1)
    ratio = mean / deviation
    expected = v * (mean * (2 * normal.cdf(ratio) - 1) + 2 * deviation * normal.log_prob(ratio).exp())
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=0)
    exact = manhattan(ours, theirs)
    assert float(((found - exact) / exact).abs().max()) < 0.1
    torch.testing.assert_close(matching_cost(student, teacher, Cost(space=space), codes), found, rtol=0, atol=0)
    module._sample.cache_clear()


def test_moments_are_float32_under_autocast(monkeypatch):
    """Only the student's logits are rounded; the variance of differences would be lost in bfloat16."""
    v = 6000
    generator = torch.Generator().manual_seed(0)
    codes = Codes(naive.basis(1, v), "cpu")
    teacher = naive.with_codes(naive.cut(torch.randn(9, v, generator=generator), 8), 3)
    weight = torch.randn(v, 16, generator=generator).bfloat16()
    head = LMHead(weight=weight, bias=None, n_tokens=v)
    hidden = torch.randn(4, 16, generator=generator).bfloat16()
    monkeypatch.setattr(module, "SAMPLED", 3000)
    module._sample.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = assignment_cost(hidden, head, teacher, Cost(), codes)
    torch.testing.assert_close(found, assignment_cost(hidden, head, teacher, Cost(), codes), rtol=1e-6, atol=0)
    module._sample.cache_clear()


def test_equal_logits_have_no_distance_and_no_nan():
    zeros = torch.zeros(2, 2)
    torch.testing.assert_close(module.mean_absolute(zeros, zeros), zeros)
    torch.testing.assert_close(module.mean_absolute(zeros - 3, zeros), zeros + 3)


def test_nothing_cut_is_exact_with_or_without_codes():
    student, dense = tokens(1, 4), tokens(2, 9)
    teacher = naive.with_codes(naive.cut(dense, V), 3)
    found = matching_cost(student, teacher, Cost(), CODES)
    torch.testing.assert_close(found.double(), manhattan(student.double(), dense.double()), rtol=1e-5, atol=1e-3)
