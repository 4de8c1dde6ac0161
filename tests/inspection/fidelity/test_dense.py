"""What a cut does, against references in float64 that are written by loops over tokens and ids."""

import itertools
import math

import pytest
import torch

from emkd.inspection.fidelity import dense as fidelity
from emkd.inspection.fidelity import synthetic_student as stand_in
from emkd.inspection.fidelity.dense import (
    TAILS,
    Assignment,
    Comparison,
    Dense,
    View,
    kl_comparison,
    regret,
    through_head,
    vlad_comparison,
)
from emkd.inspection.fidelity.synthetic_student import DISTANCES, NOISE, synthetic_student
from emkd.vlm.after_head import AfterHead
from tests.trainer import naive

V = 12


def logits(n: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


def states(n: int, seed: int, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def view(n_vision: int, seed: int, n_text: int = 5, n_answers: int = 4) -> View:
    return View(
        vision=states(n_vision, seed),
        text=states(n_text, seed + 1),
        vision_logits=logits(n_vision, seed + 2),
        answer_logits=logits(n_answers, seed + 3),
    )


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return math.fsum(abs(a - b) for a, b in zip(one.tolist(), other.tolist(), strict=True))


def totals(student: torch.Tensor, teacher: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Total distance of every one-to-one assignment: the teacher's token of each student token (Ns <= Nt)."""
    return {
        chosen: math.fsum(distance(student[i], teacher[j]) for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(len(teacher)), len(student))
    }


@pytest.mark.parametrize("k", [1, 2, 4])
def test_regret_is_that_of_trying_all_assignments(k: int) -> None:
    """Random is 1 in expectation: the mean over all assignments."""
    student, teacher = view(3, seed=5), view(5, seed=9)
    cut = naive.cut(teacher.vision_logits, k)
    exact = totals(student.vision_logits, teacher.vision_logits)
    level = cut.tail_mean.double().mean()
    dense_cut = level.expand(5, V).scatter(1, cut.ids, cut.logits.double())
    chosen = min(totals(student.vision_logits, dense_cut).items(), key=lambda item: item[1])[0]
    best, random = min(exact.values()), math.fsum(exact.values()) / len(exact)
    found = Dense.of(student, teacher).against(cut, naive.cut(teacher.answer_logits, k)).assignment
    assert found.found == pytest.approx(exact[chosen], rel=1e-6)
    assert found.best == pytest.approx(best, rel=1e-6)
    assert found.random == pytest.approx(random, rel=1e-6)
    assert found.regret == pytest.approx((exact[chosen] - best) / (random - best), abs=1e-5)
    assert regret(student.vision_logits, teacher.vision_logits, cut) == found.regret


def test_a_cut_that_hides_what_tells_tokens_apart_has_a_regret() -> None:
    """All tokens have the same largest logit, and differ only in the other logits."""
    teacher = logits(8, seed=1, scale=1.0)
    teacher[:, 0] = 20.0
    assert regret(teacher[[5, 3, 7, 1]], teacher, naive.cut(teacher, 1)) > 0.3


@pytest.mark.parametrize(("n_student", "n_teacher"), [(4, 9), (9, 9), (9, 4)])
def test_nothing_cut_is_nothing_lost(n_student: int, n_teacher: int) -> None:
    student, teacher = view(n_student, seed=20), view(n_teacher, seed=30)
    found = Dense.of(student, teacher).against(naive.cut(teacher.vision_logits, V), naive.cut(teacher.answer_logits, V))
    assert found.assignment.regret == 0.0
    for comparison in (*found.vsd.values(), *found.rld.values(), found.vlad):
        assert comparison.loss_error == pytest.approx(0.0, abs=1e-6)
        assert comparison.gradient_cosine == pytest.approx(1.0, abs=1e-6)
        assert comparison.gradient_norm_ratio == pytest.approx(1.0, abs=1e-6)
    assert found.vsd["bucket"].n == min(n_student, n_teacher)


def test_regret_of_tokens_that_are_all_alike_is_0() -> None:
    assert Assignment(found=3.0, best=3.0, random=3.0).regret == 0.0


def dense_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over tokens and ids of p (log p - log t), by loops."""
    total = torch.zeros((), dtype=torch.float64)
    for own, other in zip(student, teacher.double(), strict=True):
        log_z, log_t = own.exp().sum().log(), other.exp().sum().log()
        for v in range(V):
            total = total + (own[v] - log_z).exp() * (own[v] - log_z - other[v] + log_t)
    return total


def check(found: Comparison, cut: tuple[float, torch.Tensor], dense: tuple[float, torch.Tensor]) -> None:
    (loss, gradient), (exact, wanted) = cut, dense
    assert found.cut == pytest.approx(loss, rel=1e-5)
    assert found.dense == pytest.approx(exact, rel=1e-5)
    assert found.loss_error == pytest.approx((loss - exact) / exact, abs=1e-5)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0)
    assert found.gradient_cosine == pytest.approx(float(cosine), abs=1e-5)
    assert found.gradient_norm_ratio == pytest.approx(float(gradient.norm() / wanted.norm()), rel=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_losses_and_gradients_are_those_of_loops(tail: fidelity.Tail) -> None:
    student, teacher, cut = logits(5, 1), logits(5, 2), naive.cut(logits(5, 2), 3)
    own = student.double().requires_grad_()
    sides = []
    for loss in (naive.reverse_kl(own, cut, tail).sum(), dense_kl(own, teacher)):
        sides.append((float(loss.detach()), torch.autograd.grad(loss, own)[0]))
    found = kl_comparison(student, teacher, cut)[tail]
    check(found, *sides)
    assert found.n == 5
    assert found.as_dict()["loss"] == pytest.approx(sides[1][0] / 5)
    assert abs(found.loss_error) > 0.01


def test_vsd_is_compared_at_the_best_pairs_whatever_the_cut_finds() -> None:
    student, teacher = view(3, seed=41), view(6, seed=51)
    dense = Dense.of(student, teacher)
    cut = naive.cut(teacher.vision_logits, 1)
    found = dense.against(cut, naive.cut(teacher.answer_logits, 1))
    assert found.assignment.regret > 0
    exact = totals(student.vision_logits, teacher.vision_logits)
    best = list(min(exact.items(), key=lambda item: item[1])[0])
    own = student.vision_logits.double()
    assert found.vsd["uniform"].dense == pytest.approx(float(dense_kl(own, teacher.vision_logits[best])), rel=1e-6)
    wanted = naive.reverse_kl(own, cut.rows(torch.tensor(best)), "uniform").sum()
    assert found.vsd["uniform"].cut == pytest.approx(float(wanted), rel=1e-5)


def test_gradients_go_through_what_follows_the_head() -> None:
    """A scale and a softcap, against autograd in float64."""
    after, weight = AfterHead(scale=0.5, cap=2.0), logits(6, 3).T
    hidden, teacher = states(4, 1).double().requires_grad_(), logits(4, 2)
    own = 2 * torch.tanh(0.5 * hidden @ weight.double().T / 2)
    expected = dense_kl(own, teacher)
    (reference,) = torch.autograd.grad(expected, hidden)
    every = torch.arange(4)
    value, gradient = through_head(
        fidelity._dense_kl, own.detach().float(), weight, (every, every), lambda j: teacher[j], after
    )
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


def test_parts_add_up_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, cut = logits(7, 1), logits(7, 2), naive.cut(logits(7, 2), 3)
    whole = kl_comparison(student, teacher, cut)["bucket"]
    first, last = slice(0, 3), slice(3, 7)
    parts = [kl_comparison(student[rows], teacher[rows], cut.rows(rows))["bucket"] for rows in (first, last)]
    monkeypatch.setattr(fidelity, "CHUNK", 2 * V)
    for other in (parts[0] + parts[1], kl_comparison(student, teacher, cut)["bucket"]):
        assert vars(other) == pytest.approx(vars(whole), rel=1e-6)
    one, two = Assignment(found=3.0, best=1.0, random=5.0), Assignment(found=1.0, best=1.0, random=3.0)
    assert (one + two).regret == pytest.approx(2 / 6)


def vlad_by_loops(
    leaves: tuple[torch.Tensor, torch.Tensor], teacher: torch.Tensor, pairs: list[tuple[int, int]]
) -> tuple[float, torch.Tensor]:
    """Mean smooth L1 of cosines, and its gradient for text and vision states."""
    text, vision = leaves
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(text)):
        for i, j in pairs:
            cosine = (text[row] * vision[i]).sum() / (text[row].norm() * vision[i].norm())
            difference = (cosine - teacher[row, j].double()).abs()
            total = total + (difference**2 / 2 if difference < 1 else difference - 0.5)
    loss = total / (len(text) * len(pairs))
    return float(loss.detach()), torch.cat(torch.autograd.grad(loss, leaves))


def test_vlad_and_its_gradient_are_those_of_loops() -> None:
    text, vision = states(3, 1), states(4, 2)
    exact = states(3, 3, d=6).tanh()
    best, found = [(0, 5), (1, 0), (2, 3), (3, 1)], [(0, 5), (1, 2), (2, 4), (3, 1)]
    stored = (exact * 10).round() / 10
    leaves = text.double().requires_grad_(), vision.double().requires_grad_()
    indices = [tuple(torch.tensor(pairs).T) for pairs in (best, found)]
    comparison = vlad_comparison(text, vision, exact, *indices, stored)
    check(comparison, vlad_by_loops(leaves, stored, found), vlad_by_loops(leaves, exact, best))
    unrounded = vlad_comparison(text, vision, exact, *indices)
    check(unrounded, vlad_by_loops(leaves, exact, found), vlad_by_loops(leaves, exact, best))
    assert comparison.loss_error != unrounded.loss_error


def test_what_the_cut_finds_and_what_the_disk_rounds_are_in_the_vlad() -> None:
    student, teacher = view(3, seed=41), view(6, seed=51)
    dense, answer = Dense.of(student, teacher), naive.cut(teacher.answer_logits, V)
    uncut = naive.cut(teacher.vision_logits, V)
    zeros = torch.zeros(5, 6)
    assert dense.against(uncut, answer, zeros).vlad.loss_error != pytest.approx(0.0, abs=1e-3)
    assert dense.against(naive.cut(teacher.vision_logits, 1), answer).vlad.loss_error != pytest.approx(0.0, abs=1e-3)


def test_tensors_of_inference_mode_serve() -> None:
    """A live teacher gives such."""
    with torch.inference_mode():
        student, teacher = view(3, seed=1), view(4, seed=2)
    found = Dense.of(student, teacher).against(naive.cut(teacher.vision_logits, 2), naive.cut(teacher.answer_logits, 2))
    twice = (found + found).as_dict()
    assert set(twice) == {"regret", "vsd", "rld", "vlad", "vsd_hidden", "vsd_joint"}
    assert twice["regret"] == pytest.approx(found.assignment.regret)
    for name in ("vsd", "rld"):
        for tail in TAILS:
            assert twice[name][tail] == pytest.approx(getattr(found, name)[tail].as_dict())
    assert twice["vlad"] == pytest.approx(found.vlad.as_dict())


def test_nothing_to_compare_is_no_number() -> None:
    none = logits(0, 1)
    found = kl_comparison(none, none, naive.cut(logits(1, 2), 2).rows(slice(0, 0)))["uniform"]
    assert found.n == 0
    assert all(math.isnan(value) for value in found.as_dict().values())


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_synthetic_student_has_the_stated_distance(distance: stand_in.Distance) -> None:
    """Cosine with the mean of its neighbours, and their root mean square, measured on wide states."""
    teacher = states(12, 1, d=4096) * torch.arange(1.0, 13)[:, None]
    found = synthetic_student(teacher, 4, distance, seed=3)
    for place, token in enumerate(found):
        neighbours = teacher[3 * place : 3 * place + 3]
        mean = neighbours.mean(0)
        cosine = float(torch.nn.functional.cosine_similarity(token, mean, dim=0))
        assert cosine == pytest.approx((1 + NOISE[distance] ** 2) ** -0.5, abs=0.02)
        sizes = [float(row.pow(2).mean().sqrt()) for row in neighbours]
        assert float(token.pow(2).mean().sqrt()) == pytest.approx(sum(sizes) / 3, rel=1e-5)


def test_a_synthetic_student_is_a_function_of_the_seed() -> None:
    teacher = states(9, 1, d=32)
    first = synthetic_student(teacher, 4, "near", seed=3)
    assert torch.equal(first, synthetic_student(teacher, 4, "near", seed=3))
    assert not torch.equal(first, synthetic_student(teacher, 4, "near", seed=4))
    assert NOISE["near"] < NOISE["far"]


def test_a_synthetic_student_without_noise_of_as_many_tokens_is_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOISE, "near", 0.0)
    teacher = states(9, 1)
    torch.testing.assert_close(synthetic_student(teacher, 9, "near"), teacher)
