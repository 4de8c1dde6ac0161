"""SIGINT and SIGTERM, as real signals to real processes: a complete checkpoint, and a resumed run with equal weights."""

import pickle
import re
import signal

import pytest

from emkd.errors import StoppedError, UsageError
from emkd.trainer import load_recipe, with_flags
from emkd.trainer.loop.checkpoints import last_complete, step_of
from emkd.trainer.loop.output import what_there_is
from emkd.trainer.loop.stopping import Stopping, agreed, write_rate
from tests.trainer.loop.runs import Run, assert_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("resume")]

NEVER = {"save_strategy": "no"}  # so that what is saved is saved because of the signal


def in_step(number):
    """Whether the step after this one has begun."""
    return lambda run: str(number) in run.steps()


def assert_stopped(run, name, step=None):
    """It said what it does, saved a complete checkpoint after the step in hand, and said so. Return that step."""
    said = run.said()
    doing = r"stopping after this step; a checkpoint is saved in about \d+ s; .* again to stop at once"
    assert re.search(doing, said), said
    torchruns = "ChildFailedError" in said or "SignalException" in said
    assert "Traceback" not in said or torchruns, "torchrun has its own report of its processes"
    checkpoint = last_complete(run.output, lambda line: None)
    assert checkpoint is not None, said
    assert step in (None, step_of(checkpoint))
    left = f"emkd: stopped by {name} after step {step_of(checkpoint)}: {checkpoint} is complete. The same command"
    assert said.count(left) == 1, said
    assert len(run.steps()) <= step_of(checkpoint), "no step was begun after it"
    return step_of(checkpoint)


@pytest.mark.parametrize(
    ("number", "name", "code", "loader_workers"),
    [(signal.SIGINT, "Ctrl-C", 130, 0), (signal.SIGINT, "Ctrl-C", 130, 2), (signal.SIGTERM, "SIGTERM", 143, 2)],
)
def test_one_process(inputs, undisturbed, tmp_path, number, name, code, loader_workers):
    run = Run(inputs, tmp_path / "out", seconds=0.3, loader_workers=loader_workers, **NEVER)
    run.wait_for(in_step(4))
    run.signal(number)
    assert run.ended() == code, run.said()
    assert assert_stopped(run, name) in (4, 5)
    resumed = Run(inputs, tmp_path / "out", resume=True, **NEVER)
    resumed.finish()
    assert_same(tmp_path / "out", undisturbed)


def test_in_the_first_step_and_at_the_end_of_an_epoch(inputs, undisturbed, tmp_path):
    """Twice stopped: after step 1, and about step 3, with which the first epoch ends. `save_only_model` is no obstacle."""
    output = tmp_path / "out"
    run = Run(inputs, output, seconds=1, save_only_model=True, **NEVER)
    run.wait_for(lambda run: "\nmicro-batch" in run.said().partition("\ntraining ")[2])  # the first was a trial
    run.signal(signal.SIGINT)
    assert run.ended() == 130, run.said()
    assert assert_stopped(run, "Ctrl-C") == 1
    run = Run(inputs, output, resume=True, seconds=0.4, save_only_model=True, **NEVER)
    run.wait_for(in_step(2))
    run.signal(signal.SIGTERM)
    assert run.ended() == 143, run.said()
    assert assert_stopped(run, "SIGTERM") in (2, 3)
    Run(inputs, output, resume=True, save_only_model=True, **NEVER).finish()
    assert_same(output, undisturbed)


def test_twice_stops_at_once(inputs, tmp_path):
    run = Run(inputs, tmp_path / "out", seconds=3, **NEVER)
    run.wait_for(in_step(1))
    run.signal(signal.SIGINT)
    run.wait_for(lambda run: "to stop at once" in run.said())
    run.signal(signal.SIGINT)
    assert run.ended() == 130
    said = run.said()
    assert "emkd: stopped at once by Ctrl-C: nothing had been saved. The same command starts at the first step" in said
    assert len(run.steps()) == 1
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_save_on_signal_false(inputs, tmp_path):
    run = Run(inputs, tmp_path / "out", seconds=0.3, save_steps=2, save_on_signal=False)
    run.wait_for(in_step(3))
    run.signal(signal.SIGTERM)
    assert run.ended() == 143
    said = run.said()
    assert f"emkd: stopped at once by SIGTERM: {tmp_path}/out/checkpoint-2 is complete. The same command with" in said
    assert "stopping after" not in said


def test_before_the_first_step_it_stops_at_once(inputs, tmp_path):
    run = Run(inputs, tmp_path / "out", seconds=1)
    run.wait_for(lambda run: "loading the student" in run.said())
    run.signal(signal.SIGTERM)
    assert run.ended() == 143, run.said()
    assert "stopped at once by SIGTERM: nothing had been saved. The same command starts" in run.said()


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_agree_on_the_step(inputs, tmp_path, shard):
    """Below torchrun, which passes the signal on to ranks that have had it already."""
    ranks = {"ranks": 2, "shard": shard}
    whole = Run(inputs, tmp_path / "whole", **ranks, **NEVER)
    whole.finish()
    run = Run(inputs, tmp_path / "out", **ranks, seconds=0.3, loader_workers=2, **NEVER)
    run.wait_for(in_step(3))
    run.signal(signal.SIGINT)
    assert run.ended() != 0
    assert assert_stopped(run, "Ctrl-C") in (3, 4)
    Run(inputs, tmp_path / "out", **ranks, resume=True, **NEVER).finish()
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_ranks_agree_on_any_of_their_signals():
    assert agreed([0, 0]) == 0
    assert agreed([2, 0]) == agreed([1, 0]) == signal.SIGINT
    assert agreed([0, 1]) == agreed([1, 1]) == signal.SIGTERM


def test_no_checkpoint_is_promised_before_the_first_step(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("emkd.trainer.loop.stopping.log", said.append)
    stopping = Stopping(tmp_path, lambda: 1000, lambda: 0.1)
    with stopping.during("evaluation"):
        assert stopping.doing == "evaluation"
    stopping.announce(signal.SIGINT)
    assert "stopping before the first step of this call, which has nothing to save yet; press Ctrl-C again" in said[0]
    stopping.doing = "step"
    stopping.announce(signal.SIGINT)
    assert "a checkpoint is saved in about" in said[1]


def test_what_there_is_is_true(tmp_path):
    assert what_there_is(tmp_path / "no") == "nothing had been saved. The same command starts at the first step"
    (tmp_path / "run.json").touch()
    assert "The same command starts at the first step" in what_there_is(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    assert "The same command with --resume starts at the first step" in what_there_is(tmp_path), "it would be refused"
    (tmp_path / "checkpoint-3" / "complete.json").touch()
    assert "checkpoint-3 is complete. The same command with --resume goes on after step 3" in what_there_is(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    assert f"the trained student is in {tmp_path}" in what_there_is(tmp_path)


def test_the_rate_is_measured_where_it_writes(tmp_path):
    assert 1e6 < write_rate(tmp_path) < 1e11
    assert write_rate(tmp_path / "no") is None
    assert not list(tmp_path.iterdir())


def test_an_error_that_travels_between_processes():
    error = pickle.loads(pickle.dumps(StoppedError("what there is", 143)))  # noqa: S301
    assert (str(error), error.exit_code) == ("what there is", 143)


def test_the_field_is_ours_and_checked(inputs):
    recipe = load_recipe(inputs["recipe"])
    assert recipe.save_on_signal
    assert not with_flags(recipe, {"training.save_on_signal": False}).save_on_signal
    with pytest.raises(UsageError, match="training.save_on_signal: .*boolean"):
        with_flags(recipe, {"training.save_on_signal": "perhaps"})
