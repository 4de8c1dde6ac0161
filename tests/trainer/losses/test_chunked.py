"""Losses through the LM head in chunks, and all gradients, equal those computed from all logits at once."""

import pytest
import torch

from emkd.trainer.losses import chunked
from emkd.trainer.losses.chunked import Part, head_losses
from emkd.trainer.losses.divergence import Divergence, supervised
from emkd.vlm.after_head import NOTHING, AfterHead
from emkd.vlm.head import LMHead
from tests.trainer import naive

V, ROWS, D = 60, 64, 12
WEIGHTS = {"sup": 0.3 / 3, "rld": 0.7 / 3, "vsd": 0.25 / 7}


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def leaves():
    """hidden states of 7 vision and 5 answer tokens, weight and bias of an LM head with 4 rows of padding."""
    return [2 * numbers(1, 7, D), numbers(2, 5, D), numbers(3, ROWS, D), numbers(4, ROWS)]


def parts(vision: torch.Tensor, answers: torch.Tensor, tail: str) -> list[Part]:
    divergence, targets = Divergence(tail=tail), torch.tensor([3, 1, 4, 1, 5])
    theirs, said = naive.cut(3 * numbers(5, 7, V), 8), naive.cut(5 * numbers(6, 5, V), 8)

    def of_answers(logits, rows):
        return {"sup": supervised(logits, targets[rows]), "rld": divergence(logits, said.rows(rows)).sum()}

    def of_vision(logits, rows):
        return {"vsd": divergence(logits, theirs.rows(rows)).sum()}

    return [
        Part(hidden=answers, losses=of_answers, weights={name: WEIGHTS[name] for name in ("sup", "rld")}),
        Part(hidden=vision, losses=of_vision, weights={"vsd": WEIGHTS["vsd"]}),
    ]


def plain(
    vision: torch.Tensor,
    answers: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    tail: str,
    after: AfterHead = NOTHING,
):
    """All logits at once, in float64, by torch's autograd of the naive losses."""

    def of(hidden):
        logits = after.scale * (hidden @ weight.T + bias)[:, :V]
        return logits if after.cap is None else after.cap * torch.tanh(logits / after.cap)

    theirs, said = naive.cut(3 * numbers(5, 7, V), 8), naive.cut(5 * numbers(6, 5, V), 8)
    logits = of(answers)
    found = {
        "sup": torch.nn.functional.cross_entropy(logits, torch.tensor([3, 1, 4, 1, 5]), reduction="sum"),
        "rld": naive.reverse_kl(logits, said, tail).sum(),
        "vsd": naive.reverse_kl(of(vision), theirs, tail).sum(),
    }
    return sum(WEIGHTS[name] * loss for name, loss in found.items()), found


def gradients(total: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [g.double() for g in torch.autograd.grad(3.0 * total, leaves)]


@pytest.mark.parametrize("after", [NOTHING, AfterHead(cap=4.0), AfterHead(scale=0.3), AfterHead(scale=2.0, cap=5.0)])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_losses_and_gradients_are_those_of_whole_logits(leaves, rows, tail, after, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", rows * V)
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    head = LMHead(weight=own[2], bias=own[3], n_tokens=V, after=after)
    total, sums = head_losses(head, parts(own[0], own[1], tail))
    doubles = [leaf.double().requires_grad_() for leaf in leaves]
    expected, each = plain(*doubles, tail, after)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert {name: float(value) for name, value in sums.items()} == {
        name: pytest.approx(float(value.detach()), rel=1e-6) for name, value in each.items()
    }
    for found, reference in zip(gradients(total, own), gradients(expected, doubles), strict=True):
        assert float((found - reference).norm()) <= 1e-5 * float(reference.norm())


@pytest.mark.parametrize("learning", [(0,), (2,), (1, 3)])
def test_what_does_not_learn_has_no_gradient(leaves, learning):
    own = [leaf.clone().requires_grad_(i in learning) for i, leaf in enumerate(leaves)]
    total, _ = head_losses(LMHead(weight=own[2], bias=own[3], n_tokens=V), parts(own[0], own[1], "uniform"))
    total.backward()
    assert [leaf.grad is not None for leaf in own] == [i in learning for i in range(4)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-2), (torch.float16, 3e-3)])
def test_products_are_in_the_dtype_of_autocast(leaves, dtype, bound, monkeypatch):
    """And no gradient is lost below what float16 can hold: these are divided by a step of a billion answers."""
    monkeypatch.setattr(chunked, "CHUNK", 3 * V)
    monkeypatch.setattr(chunked, "ADDED", 7 * D)
    found = []
    for place in (torch.autocast("cpu", dtype), torch.autocast("cpu", dtype, enabled=False)):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        with place:
            tiny = [
                Part(hidden=part.hidden, losses=part.losses, weights={n: 1e-9 * w for n, w in part.weights.items()})
                for part in parts(own[0], own[1], "uniform")
            ]
            total, _ = head_losses(LMHead(weight=own[2], bias=own[3], n_tokens=V), tiny)
        assert total.dtype == torch.float32
        found.append(gradients(total, own))
    for rounded, exact in zip(*found, strict=True):
        assert 0 < float((rounded - exact).norm()) < bound * float(exact.norm())


def test_without_gradients_there_are_the_losses_alone(leaves):
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    head = LMHead(weight=own[2], bias=own[3], n_tokens=V)
    expected, _ = head_losses(head, parts(own[0], own[1], "uniform"))
    with torch.no_grad():
        total, sums = head_losses(head, parts(own[0], own[1], "uniform"))
    assert float(total) == float(expected.detach())
    assert not total.requires_grad
    assert set(sums) == {"sup", "rld", "vsd"}


def test_no_tokens_have_losses_and_gradients_of_zero(leaves):
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    vision, answers = (
        Part(hidden=part.hidden[:0], losses=part.losses, weights=part.weights)
        for part in parts(own[0], own[1], "uniform")
    )
    total, sums = head_losses(LMHead(weight=own[2], bias=own[3], n_tokens=V), [vision, answers])
    assert float(total.detach()) == 0
    assert {float(value) for value in sums.values()} == {0.0}
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, own))


def test_going_backward_twice_is_refused(leaves):
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    total, _ = head_losses(LMHead(weight=own[2], bias=own[3], n_tokens=V), parts(own[0], own[1], "uniform"))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        total.backward()


def test_a_loss_without_a_weight_is_an_error(leaves):
    (part, _) = parts(leaves[0], leaves[1], "uniform")
    head = LMHead(weight=leaves[2], bias=None, n_tokens=V)
    with pytest.raises(ValueError, match=r"losses \['rld', 'sup'\] and weights for \['sup'\]"):
        head_losses(head, [Part(hidden=part.hidden, losses=part.losses, weights={"sup": 1.0})])
