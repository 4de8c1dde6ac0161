"""The objective with a teacher read from codes, against t̂ built densely in float64 and a model run in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from emkd.storage.cache import Cache
from emkd.trainer.data.samples import Collator
from emkd.trainer.losses.divergence import Divergence
from emkd.trainer.losses.weights import Weights
from emkd.trainer.matching.cost import Cost
from emkd.trainer.objective.counts import Counts
from emkd.trainer.objective.objective import Objective
from emkd.trainer.objective.terms import StudentStates
from emkd.vlm.codes import Codes
from tests import tiny
from tests.trainer import naive
from tests.trainer.losses.test_codes import exact
from tests.trainer.test_exactness import NAMES, V, compare_gradients, gradients, relative, student_and_batch


@pytest.fixture(scope="module", params=["stored", "codes"])
def coded(request, teacher_path, data_path, tmp_path_factory):
    return tiny.make_cache(
        teacher_path, data_path, tmp_path_factory.mktemp(request.param) / "cache",
        top_k=4, answer_top_k=5, logit_error=0.3, affinity=request.param,
    )  # fmt: skip


@pytest.fixture
def student_batch(student_path, data_path, coded):
    student, batch = student_and_batch(student_path, data_path, coded, 2)
    return student, batch, Cache.open(coded).basis


def cached(student, batch, basis, **options):
    objective = Objective(Weights(), V, Divergence(tail="codes"), codes=Codes(basis, "cpu"), **options)
    return objective(student.model, student.model, batch["inputs"], batch["samples"], objective.count(batch["samples"]))


def in_float64(model, batch, basis, cost):
    """{name: loss} of the whole batch, from a pass of the model in float64."""
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch["inputs"].items()}
    hidden = model.model(**inputs).last_hidden_state
    head = model.lm_head.weight[:V]
    sums, counts = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0)
    for sample, states in zip(batch["samples"], hidden, strict=True):
        found, teacher = StudentStates.of(sample, states).states, sample.teacher
        logits = found.predicting @ head.T
        targets = sample.encoded.text_ids[sample.encoded.answer_positions]
        sums["sup"] = sums["sup"] - logits.log_softmax(1).gather(1, targets[:, None]).sum()
        sums["rld"] = sums["rld"] + exact("reverse_kl", logits, naive.t_hat(teacher.answer, basis)).sum()
        counts["sup"] += len(targets)
        counts["rld"] += len(targets)
        own, theirs = pairs_of(sample, found, head, basis, cost)
        if not len(own):
            continue
        teacher_logits = naive.t_hat(teacher.vision, basis)[theirs]
        sums["vsd"] = sums["vsd"] + exact("reverse_kl", found.vision[own] @ head.T, teacher_logits).sum()
        counts["vsd"] += len(own)
        ours = torch.nn.functional.cosine_similarity(found.text[:, None], found.vision[own][None], dim=2)
        distance = torch.nn.functional.smooth_l1_loss(ours, affinity_of(teacher, theirs, basis))
        sums["vlad"] = sums["vlad"] + distance
        counts["vlad"] += 1
    return {name: sums[name] / counts[name] for name in NAMES}


def affinity_of(teacher, theirs, basis):
    if teacher.affinity is not None:
        return teacher.affinity[:, theirs].double()
    states = [
        torch.from_numpy(basis.mean).double()
        + basis.step * codes.double() @ torch.from_numpy(basis.reconstruction).double().T
        for codes in (teacher.text_codes, teacher.vision.codes[theirs])
    ]
    return torch.nn.functional.cosine_similarity(states[0][:, None], states[1][None], dim=2)


def pairs_of(sample, found, head, basis, cost):
    own, theirs = [], []
    for image, other in zip(sample.encoded.images, sample.teacher.images, strict=True):
        tokens = sample.teacher.vision.rows(slice(other.start, other.start + other.count))
        logits = (found.vision[image.start : image.start + image.count] @ head.T).detach()
        read = naive.read(tokens, basis)
        if cost.space == "log_probabilities":
            stored = tokens.logits.double().logsumexp(1)
            logits, read = (
                logits.log_softmax(1),
                read - torch.logaddexp(stored, tokens.tail_logsumexp.double())[:, None],
            )
        i, j = linear_sum_assignment(torch.cdist(logits, read, p=1).numpy())
        own.append(torch.from_numpy(i) + image.start)
        theirs.append(torch.from_numpy(j) + other.start)
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *own]), torch.cat([none, *theirs])


@pytest.mark.parametrize("cost", [Cost(), Cost(space="log_probabilities")])
def test_losses_and_every_gradient(student_batch, cost):
    """Several images, none, several turns; padded in one batch."""
    student, batch, basis = student_batch
    model = copy.deepcopy(student.model).double()
    found, expected = cached(student, batch, basis, cost=cost), in_float64(model, batch, basis, cost)
    for name in NAMES:
        assert relative(getattr(found, name), expected[name].detach()) < 1e-4, name
    weights = Weights().named
    sum(weights[name] * expected[name] for name in NAMES).backward()
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = gradients(student, found.total)
    for name, gradient in reference.items():
        if float(gradient.norm()) > 1e-9:
            assert float((ours[name].double() - gradient).norm()) < 2e-3 * float(gradient.norm()), name


def test_a_cut_cost_chooses_the_pairs_of_a_cache_without_codes(student_batch):
    student, batch, basis = student_batch
    if batch["samples"][0].teacher.affinity is None:
        pytest.skip("VLAD, which shows the pairs, is computed from codes")
    plain = [
        replace(s, teacher=replace(s.teacher, vision=replace(s.teacher.vision, codes=None))) for s in batch["samples"]
    ]
    objective = Objective(Weights(), V, Divergence(tail="uniform"))
    expected = objective(student.model, student.model, batch["inputs"], plain, objective.count(plain))
    assert relative(cached(student, batch, basis, cost=Cost(top_k=4)).vlad, expected.vlad) < 1e-6
    assert relative(cached(student, batch, basis).vlad, expected.vlad) > 1e-4


@pytest.mark.parametrize("split", [[(0,), (1,), (2,), (3,), (4,), (5,)], [(2,), (0, 1, 3, 4, 5)]])
def test_micro_batches_add_up_to_the_step(student_batch, split):
    student, batch, basis = student_batch
    objective = Objective(Weights(), V, Divergence(tail="codes"), codes=Codes(basis, "cpu"))
    parts = [Collator(0)([batch["samples"][n] for n in numbers]) for numbers in split]
    counts = Counts.total(objective.count(p["samples"]) for p in parts)
    found = [objective(student.model, student.model, p["inputs"], p["samples"], counts) for p in parts]
    whole = cached(student, batch, basis)
    for name in NAMES:
        assert relative(sum(getattr(losses, name) for losses in found), getattr(whole, name)) < 1e-5
    one = gradients(student, sum(losses.total for losses in found))
    compare_gradients(one, gradients(student, cached(student, batch, basis).total))


def test_a_cache_without_affinities_needs_its_basis(student_batch):
    student, batch, _ = student_batch
    if batch["samples"][0].teacher.affinity is not None:
        pytest.skip("affinities are stored")
    objective = Objective(Weights(), V)
    with pytest.raises(ValueError, match="no affinity, and no codes"):
        objective(student.model, student.model, batch["inputs"], batch["samples"], objective.count(batch["samples"]))
