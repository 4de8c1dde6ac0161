"""The objective with unusual batches, and its divisors, which count the whole step."""

from dataclasses import replace

import pytest
import torch

from emkd.errors import ModelError
from emkd.trainer.data.samples import Collator
from emkd.trainer.losses.weights import Weights
from emkd.trainer.objective.counts import Counts
from emkd.trainer.objective.objective import Objective
from emkd.trainer.objective.terms import StudentStates, some_pairs
from emkd.vlm.head import LMHead
from tests.trainer import naive
from tests.trainer.test_exactness import (
    NAMES,
    V,
    cached_losses,
    compare_gradients,
    gradients,
    relative,
    student_and_batch,
)


@pytest.fixture
def student_batch(student_path, data_path, cache_path):
    return student_and_batch(student_path, data_path, cache_path, 2)


def part(batch, *numbers):
    return Collator(0)([batch["samples"][n] for n in numbers])


def test_text_only_rows_have_sup_and_rld_alone(student_batch):
    student, batch = student_batch
    losses = cached_losses(student, part(batch, 2))
    assert float(losses.sup.detach()) > 0
    assert float(losses.rld.detach()) > 0
    assert float(losses.vsd) == float(losses.vlad) == 0
    assert all(g.isfinite().all() for g in gradients(student, losses.total).values())


def test_a_text_only_row_does_not_thin_the_vision_losses(student_batch):
    student, batch = student_batch
    without, beside = cached_losses(student, part(batch, 0, 1)), cached_losses(student, part(batch, 0, 1, 2))
    assert relative(beside.vsd, without.vsd) < 1e-6
    assert relative(beside.vlad, without.vlad) < 1e-6


def test_no_answer_tokens_leave_the_vision_losses(student_batch):
    student, batch = student_batch
    sample = batch["samples"][0]
    none = torch.zeros(0, dtype=torch.long)
    silent = replace(
        sample,
        encoded=replace(sample.encoded, answer_positions=none),
        teacher=replace(sample.teacher, answer=sample.teacher.answer.rows(none)),
    )
    found, expected = cached_losses(student, Collator(0)([silent])), cached_losses(student, part(batch, 0))
    assert float(found.sup.detach()) == float(found.rld.detach()) == 0
    assert relative(found.vsd, expected.vsd) < 1e-6
    assert relative(found.vlad, expected.vlad) < 1e-6
    assert all(g.isfinite().all() for g in gradients(student, found.total).values())


@pytest.mark.parametrize(
    "split", [[(0,), (1,), (2,), (3,), (4,), (5,)], [(0, 1, 2), (3, 4, 5)], [(2,), (0, 1, 3, 4, 5)]]
)
def test_micro_batches_add_up_to_the_step(student_batch, split):
    """Ragged counts and a text-only row: the sum over micro-batches is the loss of the whole batch."""
    student, batch = student_batch
    objective = Objective(Weights(), V)
    whole = cached_losses(student, batch)
    parts = [part(batch, *numbers) for numbers in split]
    counts = Counts.total(objective.count(p["samples"]) for p in parts)
    assert counts == objective.count(batch["samples"])
    found = [objective(student.model, student.model, p["inputs"], p["samples"], counts) for p in parts]
    for name in NAMES:
        assert relative(sum(getattr(losses, name) for losses in found), getattr(whole, name)) < 1e-6
    one = gradients(student, sum(losses.total for losses in found))
    other = gradients(student, cached_losses(student, batch).total)
    compare_gradients(one, other)


def test_no_logits_are_ever_held_whole(student_batch, monkeypatch):
    """The model's own head is asked for one position of the first batch, to check it; ours for few tokens at a time."""
    student, batch = student_batch
    heads, products = [], []
    student.model.lm_head.register_forward_hook(lambda _m, _i, out: heads.append(out.shape))
    linear = torch.nn.functional.linear

    def counted(hidden, weight, bias=None):
        out = linear(hidden, weight, bias)
        products.append(out.shape)
        return out

    monkeypatch.setattr("emkd.trainer.losses.chunked.functional.linear", counted)
    monkeypatch.setattr("emkd.trainer.losses.chunked.CHUNK", 5 * V)
    objective = Objective(Weights(), V)
    counts = objective.count(batch["samples"])
    for _ in range(2):
        objective(student.model, student.model, batch["inputs"], batch["samples"], counts).total.backward()
    # None twice, of one sample, to see whether attention is causal; one position of 6 samples; and none of them
    assert heads == [(1, 0, 72), (1, 0, 72), (6, 1, 72), (6, 0, 72)]
    ours = [shape for shape in products if shape[-1] == V]
    check, *ours = ours
    assert check[0] == 6
    assert sum(shape[0] for shape in ours) == 2 * (counts.answers + 2 * counts.pairs)  # costs, as k = V, and losses
    assert max(shape[0] for shape in ours) == 5


@pytest.mark.parametrize("named", [None, 3.0])
def test_an_unknown_function_behind_the_head_is_refused(student_batch, named):
    """Losses are computed from the LM head's weight, and from what the config may name: here another function."""
    student, batch = student_batch
    student.model.config.text_config.final_logit_softcapping = named
    student.model.lm_head.register_forward_hook(lambda _m, _i, out: out.sign() * out.abs().sqrt())
    with pytest.raises(ModelError, match="changes logits after its head"):
        cached_losses(student, batch)


def test_losses_are_float32_under_bf16_autocast(student_batch):
    """From the bfloat16 logits and hidden states that the model gives, everything else in higher precision: compared
    with float64 from the very same numbers. (A cosine or a KL in bfloat16 would be off by 1e-3.)"""
    student, batch = student_batch
    objective, hiddens, models_own = Objective(Weights(), V), [], []
    student.model.lm_head.register_forward_hook(lambda _m, _i, out: models_own.append(out.detach()))
    student.model.model.register_forward_hook(lambda _m, _i, out: hiddens.append(out.last_hidden_state.detach()))
    counts = objective.count(batch["samples"])
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(student.model, student.model, batch["inputs"], batch["samples"], counts)
    assert models_own[0].dtype == torch.bfloat16
    assert {loss.dtype for loss in (found.sup, found.rld, found.vsd, found.vlad)} == {torch.float32}
    weight = student.model.lm_head.weight.detach()
    expected = in_float64(objective, batch["samples"], weight, hiddens[-1])
    for name in NAMES:
        assert relative(getattr(found, name), expected[name]) < 2e-6, name
    assert all(g.isfinite().all() for g in gradients(student, found.total).values())


def in_float64(objective, samples, weight, hidden):
    """The losses from hidden states [B, T, d] and an LM head [rows, d], whose product alone is in bfloat16."""
    heads = (hidden.bfloat16() @ weight.bfloat16().T)[..., :V].double()
    head = LMHead(weight=weight.bfloat16(), bias=None, n_tokens=V)
    sums, n_answers, n_pairs, n_vision = dict.fromkeys(NAMES, torch.zeros(())), 0, 0, 0
    for logits, states, sample in zip(heads, hidden.double(), samples, strict=True):
        ids = sample.encoded.text_ids[sample.encoded.answer_positions]
        answers = logits[sample.encoded.predicting_positions]
        sums["sup"] = sums["sup"] - answers.log_softmax(1).gather(1, ids[:, None]).sum()
        sums["rld"] = sums["rld"] + naive.reverse_kl(answers, sample.teacher.answer, "uniform").sum()
        n_answers += len(ids)
        if not sample.encoded.images:
            continue
        seen = logits[: sample.encoded.n_tokens][sample.encoded.vision_mask]
        ((own, theirs),) = objective.match(head, [StudentStates.of(sample, states.bfloat16())])
        sums["vsd"] = sums["vsd"] + naive.reverse_kl(seen[own], sample.teacher.vision.rows(theirs), "uniform").sum()
        unit = torch.nn.functional.normalize(states, dim=1)
        seen = unit[: sample.encoded.n_tokens][sample.encoded.vision_mask][own]
        difference = unit[sample.encoded.text_positions] @ seen.T - sample.teacher.affinity[:, theirs].double()
        sums["vlad"] = (
            sums["vlad"] + torch.where(difference.abs() < 1, 0.5 * difference**2, difference.abs() - 0.5).mean()
        )
        n_pairs, n_vision = n_pairs + len(own), n_vision + 1
    divisors = dict(zip(NAMES, (n_answers, n_answers, n_pairs, n_vision), strict=True))
    return {name: sums[name] / divisors[name] for name in NAMES}


def test_a_batch_of_nothing_has_losses_and_gradients_of_zero(student_batch):
    """As on a rank without a share of an epoch's last samples, also if only the projector is trained."""
    student, batch = student_batch
    nothing = Collator(0)([])
    counts = Objective(Weights(), V).count(batch["samples"])
    for learning in (".", "projector"):
        for name, parameter in student.model.named_parameters():
            parameter.requires_grad_(learning in name)
        losses = Objective(Weights(), V)(student.model, student.model, nothing["inputs"], [], counts)
        total = losses.total
        assert float(total.detach()) == 0
        found = gradients(student, total)
        assert found
        assert all(float(g.norm()) == 0 for g in found.values())


def test_weights_choose_the_losses():
    assert Weights(alpha=1, beta=0, gamma=0).named == {"sup": 1}
    assert not Weights(alpha=1, beta=0, gamma=0).needs_cache
    assert Weights(alpha=1, beta=0.5, gamma=0).named == {"sup": 1, "vsd": 0.5}
    assert Weights().named == {"sup": 0.5, "rld": 0.5, "vsd": 0.25, "vlad": 25.0}


def test_the_total_is_the_weighted_sum(student_batch):
    student, batch = student_batch
    losses = cached_losses(student, batch)
    expected = 0.5 * losses.sup + 0.5 * losses.rld + 0.25 * losses.vsd + 25 * losses.vlad
    assert relative(losses.total, expected) < 1e-6
    alone = cached_losses(student, batch, Weights(alpha=1, beta=0, gamma=0))
    assert float(alone.total.detach()) == pytest.approx(float(losses.sup), rel=1e-6)
    assert float(alone.rld) == float(alone.vsd) == float(alone.vlad) == 0


def test_repeated_and_missing_ids_are_told_apart_by_key(student_batch):
    """Rows 0 and 3 have the same id, row 4 has none: each got its own record."""
    _, batch = student_batch
    keys = [sample.encoded.key for sample in batch["samples"]]
    assert len(set(keys)) == 6
    for sample in batch["samples"]:
        assert sample.teacher.affinity.shape == (len(sample.encoded.text_ids), 16 * len(sample.encoded.images))


def test_a_share_of_the_pairs_has_the_expected_gradient_of_all(student_batch, monkeypatch):
    """One of four pairs, and each of them once: the mean is that of all, of losses and gradients."""
    student, batch = student_batch
    one, weights = part(batch, 0), Weights(alpha=1.0, beta=1.0, gamma=0.0)
    whole = cached_losses(student, one, weights)
    expected, n = gradients(student, whole.total), Objective(weights, V).count(one["samples"]).pairs
    assert n == 4
    found, vsd = [], []
    for first in range(n):
        monkeypatch.setattr("torch.randperm", lambda n, first=first: torch.arange(n).roll(first))
        losses = cached_losses(student, one, weights, vision_share=1 / n)
        vsd.append(losses.vsd.detach())
        found.append(gradients(student, losses.total))
    assert len({float(one) for one in vsd}) > 1
    assert relative(torch.stack(vsd).mean(), whole.vsd) < 1e-5
    compare_gradients({name: sum(draw[name] for draw in found) / n for name in expected}, expected)


@pytest.mark.parametrize(("share", "n", "taken"), [(1.0, 5, 5), (0.5, 5, 2), (0.5, 6, 3), (0.1, 5, 1), (0.9, 10, 9)])
def test_pairs_are_drawn_without_replacement_and_stay_together(share, n, taken):
    own, theirs = some_pairs((torch.arange(n), 10 * torch.arange(n)), share)
    assert len(own) == len(set(own.tolist())) == taken
    assert torch.equal(theirs, 10 * own)


def test_all_pairs_draw_no_random_numbers():
    """So that a run without a share has the dropout that it had before there was one."""
    before = torch.random.get_rng_state()
    some_pairs((torch.arange(5), torch.arange(5)), 1.0)
    assert torch.equal(torch.random.get_rng_state(), before)
