"""With k = V in float32 nothing is cut: a written and re-read cache gives what the teacher in memory gives."""

from pathlib import Path

import pytest
import torch

from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer.data.samples import Collator, StudentSamples, TeacherLimits
from emkd.trainer.losses.divergence import Divergence
from emkd.trainer.losses.weights import Weights
from emkd.trainer.matching.cost import Cost
from emkd.trainer.matching.match import matching_cost
from emkd.trainer.objective.objective import Losses, Objective
from emkd.trainer.objective.terms import StudentStates
from emkd.vlm import load
from emkd.vlm.forward import last_hidden_state, lm_logits
from emkd.vlm.head import LMHead
from emkd.vlm.pooling import pooled
from tests import tiny
from tests.trainer import dense

V = len(tiny.VOCABULARY)
NAMES = ("sup", "rld", "vsd", "vlad")


def student_and_batch(student_path: Path, data: Path, cache_path: Path, pool: int):
    student = load(str(student_path))
    student.model = pooled(student.model, student.processor, pool)
    cache = Cache.open(cache_path)
    samples = StudentSamples(
        Dataset(str(data)),
        Encoder(student.processor, student.image_token_id),
        cache.sample_rows.tolist(),
        cache,
        TeacherLimits(vocabulary=cache.manifest.vocabulary_size, n_student_tokens=student.n_tokens),
    )
    return student, Collator(0)([samples[i] for i in range(len(samples))])


class Only(Weights):
    """One loss alone, with weight 1."""

    def __init__(self, name: str) -> None:
        super().__init__(beta=float(name == "vsd"), gamma=float(name == "vlad"))
        object.__setattr__(self, "only", name)

    @property
    def named(self) -> dict[str, float]:
        return {self.only: 1.0}


def cached_losses(student, batch, weights=Weights(), **options) -> Losses:
    objective = Objective(weights, V, **options)
    counts = objective.count(batch["samples"])
    return objective(student.model, student.model, batch["inputs"], batch["samples"], counts)


def dense_losses(student, teacher_path: Path, per_image: int, space: str = "logits") -> dict[str, torch.Tensor]:
    """per_image: vision tokens that the student has of an image; the teacher has 16."""
    teacher = load(str(teacher_path))
    with torch.no_grad():
        theirs = [dense.view(teacher.model, teacher.processor, row, 16, V) for row in tiny.rows()]
    ours = [dense.view(student.model, student.processor, row, per_image, V) for row in tiny.rows()]
    return dense.losses(ours, theirs, space)


def gradients(student, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    student.model.zero_grad()
    loss.backward()
    return {n: p.grad.double().clone() for n, p in student.model.named_parameters() if p.grad is not None}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.fixture(scope="module")
def large_student_path(tmp_path_factory):
    """Sees images at twice the teacher's side: 64 vision tokens."""
    return tiny.save_model(tmp_path_factory.mktemp("large"), seed=4, hidden=24, side=40)


# (pool, vision tokens of an image): fewer than the teacher's 16, as many, one, more.
@pytest.mark.parametrize(("pool", "per_image"), [(2, 4), (1, 16), (4, 1), (1, 64)])
@pytest.mark.parametrize(
    ("tail", "space"), [("bucket", "logits"), ("uniform", "logits"), ("uniform", "log_probabilities")]
)
def test_losses_and_gradients_equal_the_dense_ones(
    pool, per_image, tail, space, student_path, large_student_path, teacher_path, data_path, cache_path
):
    path = large_student_path if per_image == 64 else student_path
    student, batch = student_and_batch(path, data_path, cache_path, pool)
    options = {"divergence": Divergence(tail=tail), "cost": Cost(space=space)}
    found = cached_losses(student, batch, **options)
    expected = dense_losses(student, teacher_path, per_image, space)
    weights = dict(zip(NAMES, (0.5, 0.5, 0.25, 25.0), strict=True))
    for name in NAMES:
        assert float(expected[name].detach()) > 1e-3, "a loss of nothing would agree with anything"
        assert relative(getattr(found, name), expected[name]) <= 1e-5, name
        one = gradients(student, cached_losses(student, batch, Only(name), **options).total)
        other = gradients(student, dense_losses(student, teacher_path, per_image, space)[name])
        compare_gradients(one, other)
    total = sum(weights[name] * expected[name] for name in NAMES)
    assert relative(found.total, total) <= 1e-5
    compare_gradients(gradients(student, found.total), gradients(student, total))


def compare_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every parameter's; those whose gradient is nothing but rounding (a bias before a softmax) by the whole's size."""
    assert set(expected) <= set(found)
    assert all(not found[name].any() for name in found.keys() - expected.keys())  # the head, of VLAD alone
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert float(whole) > 0
    for name, expected_gradient in expected.items():
        error = float((found[name] - expected_gradient).norm())
        assert error <= 1e-5 * max(float(expected_gradient.norm()), 1e-3 * float(whole)), name


@pytest.mark.parametrize(("pool", "per_image"), [(2, 4), (1, 16), (4, 1), (1, 64)])
def test_total_cost_of_the_assignment_equals_the_dense_one(
    pool, per_image, student_path, large_student_path, teacher_path, data_path, cache_path
):
    path = large_student_path if per_image == 64 else student_path
    student, batch = student_and_batch(path, data_path, cache_path, pool)
    expected = dense_losses(student, teacher_path, per_image)["cost"]
    objective = Objective(Weights(), V)
    hidden = last_hidden_state(student.model, batch["inputs"])
    cost = 0.0
    for states, sample in zip(hidden, batch["samples"], strict=True):
        own = StudentStates.of(sample, states)
        ((i, j),) = objective.match(LMHead.of(student.model, V), [own])
        if len(i):
            cost += float(
                matching_cost(lm_logits(student.model, own.states.vision, V), sample.teacher.vision)[i, j].sum()
            )
    assert abs(cost - float(expected)) <= 1e-5 * float(expected)


# What rounding on disk may change, relative; "gradient" is that of the total loss, all parameters together.
BOUNDS = {
    ("bfloat16", "float32"): {"sup": 1e-6, "rld": 1e-3, "vsd": 1e-3, "vlad": 1e-6, "gradient": 2e-3},
    ("float32", "int8"): {"sup": 1e-6, "rld": 1e-6, "vsd": 1e-6, "vlad": 2e-3, "gradient": 1e-2},
    ("bfloat16", "int8"): {"sup": 1e-6, "rld": 1e-3, "vsd": 1e-3, "vlad": 2e-3, "gradient": 1e-2},
    ("float16", "float16"): {"sup": 1e-6, "rld": 1e-4, "vsd": 1e-4, "vlad": 1e-4, "gradient": 5e-4},
}


@pytest.mark.parametrize(("logits", "affinity"), list(BOUNDS))
def test_bounds_of_stored_precision(logits, affinity, student_path, teacher_path, data_path, tmp_path):
    cache = tiny.make_cache(teacher_path, data_path, tmp_path / "cache", precision=logits, affinity_precision=affinity)
    student, batch = student_and_batch(student_path, data_path, cache, 2)
    found, expected = cached_losses(student, batch), dense_losses(student, teacher_path, 4)
    bounds = BOUNDS[logits, affinity]
    for name in NAMES:
        assert relative(getattr(found, name), expected[name]) <= bounds[name], name
    one = gradients(student, found.total)
    other = gradients(student, sum(w * expected[n] for n, w in zip(NAMES, (0.5, 0.5, 0.25, 25.0), strict=True)))
    whole = [torch.cat([g[name].flatten() for name in sorted(g)]) for g in (one, other)]
    assert relative(whole[0], whole[1]) <= bounds["gradient"]


def test_random_matching_gives_other_losses(student_path, data_path, cache_path):
    student, batch = student_and_batch(student_path, data_path, cache_path, 2)
    by_logits, at_random = cached_losses(student, batch), cached_losses(student, batch, matching="random")
    one, other = ({name: float(getattr(x, name).detach()) for name in NAMES} for x in (by_logits, at_random))
    assert other["vsd"] > 1.01 * one["vsd"]
    assert other["vlad"] != one["vlad"]
    assert (other["sup"], other["rld"]) == (one["sup"], one["rld"])
