import pytest
import torch

from emkd.errors import DataMismatchError, UsageError
from emkd.storage.record import ImageSpan
from emkd.trainer.matching.cost import assignment_cost
from emkd.trainer.matching.match import MATCHINGS, VisionTokens, assign, count_pairs, match, matching_cost
from emkd.vlm.head import LMHead
from tests.trainer import naive

V = 60


def tokens(seed: int, n: int) -> torch.Tensor:
    return 2 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


# Hidden states that are logits already.
AS_THEY_ARE = LMHead(weight=torch.eye(V), bias=None, n_tokens=V)


def match_sample(method, student_logits, teacher, own, theirs, seed):
    sample = VisionTokens(hidden=student_logits, teacher=teacher, images=own, teacher_images=theirs, seed=seed)
    (pairs,) = match(method, [sample], AS_THEY_ARE)
    return pairs


def span(start: int, count: int, grid: tuple[int, int] | None = None) -> ImageSpan:
    return ImageSpan(text_position=0, start=start, count=count, grids=(grid,) if grid else (), original_size=(8, 8))


@pytest.mark.parametrize(("n_student", "n_teacher"), [(4, 16), (16, 16), (16, 4), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("k", [1, 8, 59, 60])
def test_cost_is_the_distance_to_t_hat(n_student, n_teacher, k):
    student, teacher = tokens(1, n_student), naive.cut(tokens(2, n_teacher), k)
    found, expected = matching_cost(student, teacher), naive.cost(student, teacher)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_cost_with_ids_that_the_student_lacks():
    teacher = naive.cut(tokens(2, 9), 8).for_student(45)
    student = tokens(1, 4)[:, :45]
    torch.testing.assert_close(
        matching_cost(student, teacher).double(), naive.cost(student, teacher), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("n_student", "n_teacher"), [(7, 16), (16, 7)])
@pytest.mark.parametrize("k", [8, V])
def test_cost_from_hidden_states_orders_assignments_as_the_distance_does(n_student, n_teacher, k):
    """If every student token is matched, a constant for each student token may be left out; otherwise nothing may."""
    generator = torch.Generator().manual_seed(5)
    head = LMHead(weight=torch.randn(V + 4, 6, generator=generator), bias=torch.randn(V + 4), n_tokens=V)
    hidden, teacher = torch.randn(n_student, 6, generator=generator), naive.cut(tokens(2, n_teacher), k)
    logits = (hidden.double() @ head.weight.double().T + head.bias.double())[:, :V]
    difference = assignment_cost(hidden, head, teacher).double() - naive.cost(logits, teacher)
    if n_student > n_teacher or k == V:
        assert difference.abs().max() < 1e-4
    else:
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-4)
        assert difference.abs().min() > 1


def test_cost_in_chunks_is_the_same(monkeypatch):
    head = LMHead(weight=tokens(4, V)[:, :12], bias=None, n_tokens=V)
    for n_student, n_teacher in ((7, 16), (16, 7)):
        hidden, teacher = tokens(1, n_student)[:, :12], naive.cut(tokens(2, n_teacher), 8)
        whole = assignment_cost(hidden, head, teacher), matching_cost(tokens(1, n_student), teacher)
        for name, value in (("cost.COPIED", {"cpu": 1}), ("cost.LOGITS", 1)):
            monkeypatch.setattr(f"emkd.trainer.matching.{name}", value)
        monkeypatch.setattr("emkd.vlm.head.GATHERED", {"cpu": 1})
        found = assignment_cost(hidden, head, teacher), matching_cost(tokens(1, n_student), teacher)
        for one, other in zip(whole, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
        monkeypatch.undo()


@pytest.mark.parametrize("k", [8, V])
@pytest.mark.parametrize(("n_student", "n_teacher"), [(12, 40), (40, 40), (40, 12)])
def test_a_planted_permutation_is_found(n_student, n_teacher, k):
    """Student tokens are teacher tokens in another order, with noise of a tenth of their spread."""
    generator = torch.Generator().manual_seed(3)
    both = tokens(2, max(n_student, n_teacher))
    planted = torch.randperm(len(both), generator=generator)
    noisy = both[planted] + 0.2 * torch.randn(len(both), V, generator=generator)
    i, j = assign(matching_cost(noisy[:n_student], naive.cut(both[:n_teacher], k)))
    assert len(i) == min(n_student, n_teacher)
    there = planted[:n_student][i] < n_teacher  # students whose teacher is among those that can be matched
    expected = int((planted[:n_student] < n_teacher).sum())
    assert expected >= 8
    if n_student >= n_teacher:  # every teacher token has its own student token, and no other one is as near
        assert int(there.sum()) == expected == n_teacher
    assert torch.equal(planted[:n_student][i][there], j[there])


def test_the_assignment_has_the_least_total_cost():
    from itertools import permutations

    cost = matching_cost(tokens(1, 4), naive.cut(tokens(2, 6), 8))
    i, j = assign(cost)
    best = min(sum(float(cost[r, c]) for r, c in enumerate(p)) for p in permutations(range(6), 4))
    assert float(cost[i, j].sum()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("method", MATCHINGS)
def test_images_do_not_mix(method):
    """The second image's tokens look like the first one's teacher: they stay with their own all the same."""
    teacher_tokens = tokens(2, 32)
    student_tokens = torch.cat([teacher_tokens[16:20], teacher_tokens[0:4]])
    own = [span(0, 4, (2, 2)), span(4, 4, (2, 2))]
    theirs = [span(0, 16, (4, 4)), span(16, 16, (4, 4))]
    i, j = match_sample(method, student_tokens, naive.cut(teacher_tokens, 8), own, theirs, "seed")
    assert len(i) == count_pairs(method, own, theirs)
    assert torch.equal(i // 4, j // 16)


def test_a_sample_without_images_has_no_pairs():
    nothing = naive.cut(tokens(2, 1), 8).rows(slice(0, 0))
    i, j = match_sample("logits", tokens(1, 0), nothing, [], [], "seed")
    assert len(i) == len(j) == 0
    assert count_pairs("logits", [], []) == 0


def test_pooled_pairs_are_cells_of_the_grid():
    i, j = match_sample(
        "pooled", tokens(1, 4), naive.cut(tokens(2, 16), 8), [span(0, 4, (2, 2))], [span(0, 16, (4, 4))], ""
    )
    cells = {int(c): sorted(j[i == c].tolist()) for c in range(4)}
    assert cells == {0: [0, 1, 4, 5], 1: [2, 3, 6, 7], 2: [8, 9, 12, 13], 3: [10, 11, 14, 15]}


def test_random_pairs_are_a_function_of_the_seed():
    def draw(seed: str) -> torch.Tensor:
        return match_sample("random", tokens(1, 9), naive.cut(tokens(2, 30), 8), [span(0, 9)], [span(0, 30)], seed)[1]

    assert torch.equal(draw("a"), draw("a"))
    assert not torch.equal(draw("a"), draw("b"))
    assert len(set(draw("a").tolist())) == 9


def test_unequal_numbers_of_images_are_refused():
    with pytest.raises(DataMismatchError, match="2 images for the student and 1 in the cache"):
        match_sample("logits", tokens(1, 8), naive.cut(tokens(2, 16), 8), [span(0, 4), span(4, 4)], [span(0, 16)], "")


@pytest.mark.parametrize(
    ("own", "theirs"), [(span(0, 4), span(0, 16, (4, 4))), (span(0, 9, (3, 3)), span(0, 16, (4, 4)))]
)
def test_pooling_needs_grids_that_fit(own, theirs):
    with pytest.raises(UsageError, match="use --matching logits"):
        match_sample("pooled", tokens(1, own.count), naive.cut(tokens(2, 16), 8), [own], [theirs], "")
