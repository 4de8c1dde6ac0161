"""A sharded run that is killed and resumed: bit for bit on as many ranks, and to rounding on any other number."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from emkd.trainer import Recipe, with_flags
from emkd.trainer.loop.first_run import OF_STEP, _deciding, _workers
from tests import tiny
from tests.trainer.loop.runs import Run, assert_same, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("resume")]

EACH_STEP = {"max_steps": 6, "save_steps": 1, "save_total_limit": 9}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """On two ranks, undisturbed; the student has dropout."""
    run = Run(inputs, tmp_path_factory.mktemp("whole") / "out", ranks=2, shard=True, **EACH_STEP)
    run.finish()
    return run.output


def rank_processes(run):
    """The ids of the ranks, children of torchrun's process."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_rank_that_is_killed(inputs, whole, tmp_path):
    run = Run(inputs, tmp_path / "out", ranks=2, shard=True, seconds=0.2, **EACH_STEP)
    run.wait_for(lambda run: "3" in run.steps())
    time.sleep(0.2)
    os.kill(rank_processes(run)[1], signal.SIGKILL)
    assert run.ended() != 0
    second = Run(inputs, tmp_path / "out", ranks=2, shard=True, resume=True, **EACH_STEP)
    second.finish()
    assert int(second.steps()[0]) > 2, "it resumes where it was"
    assert_same(tmp_path / "out", whole)


@pytest.fixture(scope="module")
def without_dropout(inputs, tmp_path_factory):
    student = tiny.save_model(tmp_path_factory.mktemp("plain"), seed=2, hidden=24)
    return {**inputs, "student": str(student)}


@pytest.fixture(scope="module")
def two_ranks(without_dropout, tmp_path_factory):
    """Steps of four samples, as two micro-batches of one on each of two ranks."""
    run = Run(without_dropout, tmp_path_factory.mktemp("two") / "out", ranks=2, shard=True, **EACH_STEP)
    run.finish()
    return run.output


def continued(inputs, output, folder, ranks, **division):
    """Resume a copy of a run from its third step."""
    shutil.copytree(output, folder)
    for step in (4, 5, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run = Run(inputs, folder, ranks=ranks, shard=True, resume=True, **EACH_STEP, **division)
    run.finish()
    assert run.steps()[0] == "4"
    return run


def test_four_ranks_resume_what_two_have_saved(without_dropout, two_ranks, tmp_path):
    run = continued(without_dropout, two_ranks, tmp_path / "out", 4, gradient_accumulation_steps=1)
    assert "was saved by 2 workers, and 4 resume from it" in run.said()
    assert_close(tmp_path / "out", two_ranks)


def test_two_ranks_resume_with_larger_batches(without_dropout, two_ranks, tmp_path):
    division = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    run = continued(without_dropout, two_ranks, tmp_path / "out", 2, **division)
    assert "workers, and" not in run.said()
    assert_close(tmp_path / "out", two_ranks)


KEYS = "k_proj.bias"  # its gradient is rounding alone, which AdamW makes a step of the learning rate of


def assert_close(found, expected):
    found, expected = weights(found), {name: one for name, one in weights(expected).items() if KEYS not in name}
    whole = torch.cat([tensor.flatten().double() for tensor in expected.values()])
    differing = torch.cat([(found[name].double() - tensor.double()).flatten() for name, tensor in expected.items()])
    assert float(differing.norm()) <= 1e-6 * float(whole.norm())


def test_other_steps_are_refused(without_dropout, two_ranks, tmp_path):
    shutil.copytree(two_ranks, tmp_path / "out")
    run = Run(
        without_dropout, tmp_path / "out", ranks=2, shard=True, resume=True, **EACH_STEP, gradient_accumulation_steps=4
    )
    assert run.ended() != 0
    assert "samples of a step was 4 and is 8" in run.said()


def test_a_whole_run_cannot_become_a_sharded_one(without_dropout, tmp_path):
    Run(without_dropout, tmp_path / "out", ranks=2, **EACH_STEP).finish()
    run = Run(without_dropout, tmp_path / "out", ranks=2, shard=True, resume=True, **EACH_STEP)
    assert run.ended() != 0
    assert "recipe.student.shard was False and is True" in run.said()


def test_what_decides_a_sharded_run_is_the_samples_of_a_step():
    sharded = with_flags(Recipe(), {"student.shard": True, f"training.{OF_STEP[0]}": 4, f"training.{OF_STEP[1]}": 2})
    assert _workers(sharded, 3) == {"samples of a step": 24}
    assert not {*OF_STEP} & _deciding(sharded, has_codes=False)["training"].keys()
    assert _workers(Recipe(), 3) == {"workers": 3}
