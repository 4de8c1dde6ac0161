"""What the objective does with unusual batches, and that its divisors are those of the whole step."""

from dataclasses import replace

import pytest
import torch

from emkd.trainer.objective import Counts, Objective, Weights
from emkd.trainer.stream import Collator
from tests.trainer.test_exactness import NAMES, V, cached_losses, gradients, relative, student_and_batch


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
    assert all(g.isfinite().all() for g in gradients(student, losses.total(Weights())).values())


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
    assert all(g.isfinite().all() for g in gradients(student, found.total(Weights())).values())


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
    one = gradients(student, sum(losses.total(Weights()) for losses in found))
    other = gradients(student, cached_losses(student, batch).total(Weights()))
    for name in other:
        assert float((one[name] - other[name]).norm()) <= 1e-5 * max(float(other[name].norm()), 1e-3), name


def test_weights_choose_the_losses():
    assert Weights(alpha=1, beta=0, gamma=0).named == {"sup": 1}
    assert not Weights(alpha=1, beta=0, gamma=0).needs_cache
    assert Weights(alpha=1, beta=0.5, gamma=0).named == {"sup": 1, "vsd": 0.5}
    assert Weights().named == {"sup": 0.5, "rld": 0.5, "vsd": 0.25, "vlad": 25.0}


def test_the_total_is_the_weighted_sum(student_batch):
    student, batch = student_batch
    losses = cached_losses(student, batch)
    expected = 0.5 * losses.sup + 0.5 * losses.rld + 0.25 * losses.vsd + 25 * losses.vlad
    assert relative(losses.total(Weights()), expected) < 1e-6
    assert float(losses.total(Weights(alpha=1, beta=0, gamma=0)).detach()) == float(losses.sup.detach())


def test_repeated_and_missing_ids_are_told_apart_by_key(student_batch):
    """Rows 0 and 3 have the same id, row 4 has none: each got its own record."""
    _, batch = student_batch
    keys = [sample.encoded.key for sample in batch["samples"]]
    assert len(set(keys)) == 6
    for sample in batch["samples"]:
        assert sample.teacher.affinity.shape == (len(sample.encoded.text_ids), 16 * len(sample.encoded.images))
