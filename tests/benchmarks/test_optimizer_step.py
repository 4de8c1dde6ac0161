"""benchmarks/step/optimizer_step.py at a size that takes seconds: the functions that measure the real sizes."""

from pathlib import Path

import pytest
import torch

from benchmarks.common import random_llava as shapes
from benchmarks.step import cases, dense
from benchmarks.step import optimizer_step as step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    step.prepare(step.CASES["tiny"], folder, "cpu")
    return folder


def test_the_dense_teacher_and_the_cache_have_the_same_losses_if_nothing_is_cut() -> None:
    found = step.agreement(cases.tiny(torch.float32))
    assert set(found) == {"sup", "rld", "vsd", "vlad"}
    assert max(found.values()) <= 1e-5


def test_a_dense_teacher_that_does_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_order(student: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(len(student)), torch.arange(len(student))

    monkeypatch.setattr(dense, "match", in_order)
    with pytest.raises(RuntimeError, match="the losses of one step differ"):
        step.agreement(cases.tiny(torch.float32))


def test_gradients_of_dense_and_cached_steps_are_equal(tmp_path: Path) -> None:
    case = cases.tiny(torch.float32).uncut()
    step.prepare(case, tmp_path, "cpu")
    steps = step.Steps(case, tmp_path, "cpu", ("cache", "dense", "live"))
    found = {}
    for variant in ("dense", "cache", "live"):
        steps._losses(variant, steps.load(variant)).total.backward()
        gradients = [parameter.grad for parameter in steps.trainable if parameter.grad is not None]
        found[variant] = torch.cat([gradient.flatten() for gradient in gradients])
        steps.optimizer.zero_grad()
    for variant in ("cache", "live"):
        assert float((found[variant] - found["dense"]).norm() / found["dense"].norm()) <= 1e-4


def test_all_variants_are_timed_on_the_same_student(prepared: Path) -> None:
    """In bfloat16 with padding rows and a tied LM head, like the case `gpu`."""
    found = step.times(step.CASES["tiny"], prepared, "cpu")
    assert {name: len(runs) for name, runs in found.items()} == {
        "sft": 2,
        "cache": 2,
        "codes": 2,
        "dense": 1,
        "live": 2,
    }
    for runs in found.values():
        assert all(run["step_s"] > 0 and run["waiting_s"] > 0 for run in runs)
    assert found["sft"][0]["sup"] == pytest.approx(found["cache"][0]["sup"], rel=1e-3)
    assert found["sft"][0]["rld"] == 0 < found["cache"][0]["rld"]
    assert found["cache"][0]["assignment_share"] > 0 == found["sft"][0]["assignment_share"]


def test_a_step_changes_nothing_of_the_student(prepared: Path) -> None:
    steps = step.Steps(step.CASES["tiny"], prepared, "cpu", ("cache",))
    before = [parameter.detach().clone() for parameter in steps.trainable]
    steps.step("cache", steps.load("cache"))
    assert all(torch.equal(one, other) for one, other in zip(before, steps.trainable, strict=True))
    assert steps.teacher is None


def test_memory_counts_the_teacher(tmp_path: Path) -> None:
    """The pair's teacher is much larger than everything else: 117 MB."""
    tower = shapes.Tower(hidden=32, layers=1, heads=2, intermediate=48, side=20, patch=5)
    small = shapes.Text(hidden=24, layers=1, heads=2, key_value_heads=1, intermediate=48, rows=100)
    large = shapes.Text(hidden=512, layers=4, heads=4, key_value_heads=4, intermediate=4096, rows=100)
    teacher, student = (shapes.Shape(text=text, tower=tower, n_tokens=100) for text in (large, small))
    chosen = dict(batch=1, words=(4, 8), top_k=8, rounds=1, dense_rounds=1)
    case = cases.random_case(teacher, student, **chosen)
    step.prepare(case, tmp_path, "cpu")
    found = {variant: step.memory_here(variant, case, tmp_path, "cpu") for variant in step.VARIANTS}
    assert found["sft"] < 40e6
    assert found["cache"] < 40e6
    assert found["dense"] > 100e6
    assert found["live"] > 100e6


def test_memory_is_measured_in_a_process_of_its_own(prepared: Path) -> None:
    assert step.memory("cache", "tiny", prepared, "cpu") > 0


def test_ratios_and_what_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    middle = {
        name: {"step_s": seconds, "waiting_s": 0.5, "assignment_share": 0.1, "peak_mib": 10 * seconds}
        for name, seconds in {"sft": 1.0, "cache": 2.0, "dense": 6.0, "live": 5.0}.items()
    }
    monkeypatch.setattr(step, "agreement", lambda case: {})
    monkeypatch.setattr(step, "measure_case", lambda name, device, only: {"median": middle})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = step.measure()
    assert found["cases"]["gpu"] == found["step_ratio"]["gpu"] == "not measured"
    assert found["step_ratio"]["demo"] == {
        "cache/sft": 2.0,
        "dense teacher/cache": 3.0,
        "teacher with our losses/cache": 2.5,
        "memory cache/sft": 2.0,
        "memory dense teacher/cache": 3.0,
        "memory teacher with our losses/cache": 2.5,
    }
    shown = step.show(found).splitlines()
    assert "gpu | not measured | | | |" in shown
    assert "cache/sft | 2.00 | 2.00 | 2.00 | not measured" in shown


def test_the_real_shapes() -> None:
    """Tokens of an image and sizes of the GPU's case, from its configuration."""
    case = step.CASES["gpu"]
    teacher, student = case.teacher.args[0], case.student.args[0]
    assert (teacher.n_vision, student.n_vision) == (729, 144)
    assert (student.text.hidden, student.text.layers, student.n_tokens) == (896, 24, 151_936)
