"""A run that is killed and resumed ends with the weights of an undisturbed run, bit for bit.

The student has dropout, so that a random state that is not restored shows; steps accumulate two micro-batches, and
epochs end in the middle of the run.
"""

import json
import os
import random
import shutil
import time
from dataclasses import replace

import pytest

from emkd.errors import DamagedCheckpointError, InputNotFoundError, UsageError
from emkd.trainer import train_student, with_flags
from emkd.trainer.loop.checkpoints import complete, last_complete
from tests import tiny
from tests.trainer.loop.runs import STEPS, Run, assert_same, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("resume")]


@pytest.mark.parametrize("loader_workers", [(0, 0), (2, 2), (0, 2)])
def test_killed_at_a_random_step(inputs, undisturbed, tmp_path, loader_workers):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    output = tmp_path / "out"
    first = Run(inputs, output, loader_workers=loader_workers[0])
    step = chance.randint(1, STEPS - 2)
    first.wait_for(lambda run: str(step) in run.steps())
    time.sleep(chance.random() * 0.1)
    first.kill()
    done = len(first.steps())
    second = Run(inputs, output, resume=True, loader_workers=loader_workers[1])
    second.finish()
    assert int(second.steps()[0]) <= done + 2, "it resumes where it was"
    if done > 4:
        assert int(second.steps()[0]) > 1
    assert_same(output, undisturbed)


def test_killed_while_it_saves(inputs, undisturbed, tmp_path):
    """A checkpoint's folder appears, and the process is killed before complete.json does (or just after)."""
    output = tmp_path / "out"
    for step in (4, 8):
        run = Run(inputs, output, resume=step > 4)
        run.wait_for(lambda run, step=step: (output / f"checkpoint-{step}" / "model.safetensors").exists())
        run.kill()
    Run(inputs, output, resume=True).finish()
    assert_same(output, undisturbed)


@pytest.fixture(scope="module")
def every_checkpoint(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    train_student(settings(inputs, output, save_total_limit=99))
    return output


@pytest.mark.parametrize("step", [*range(2, STEPS, 2), STEPS])
def test_resumed_from_every_checkpoint(inputs, undisturbed, every_checkpoint, tmp_path, step, capsys):
    """Without a kill, so that each one is tried: in the middle of epochs, at their ends, and at the run's."""
    output = tmp_path / "out"
    shutil.copytree(every_checkpoint / f"checkpoint-{step}", output / f"checkpoint-{step}")
    shutil.copy(every_checkpoint / "run.json", output)
    train_student(settings(inputs, output, resume=True, save_total_limit=99))
    assert_same(output, undisturbed)
    saved = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    assert saved == [n for n in (*range(2, STEPS, 2), STEPS) if n >= step], "no step too many"
    assert f"step {STEPS + 1}" not in capsys.readouterr().err


def test_a_half_saved_checkpoint_is_made_anew(inputs, undisturbed, every_checkpoint, tmp_path):
    """No file remains that belongs to no checkpoint."""
    output = tmp_path / "out"
    for step in (2, 4):
        shutil.copytree(every_checkpoint / f"checkpoint-{step}", output / f"checkpoint-{step}")
    shutil.copy(every_checkpoint / "run.json", output)
    (output / "checkpoint-4" / "complete.json").unlink()
    (output / "checkpoint-4" / "stale.safetensors").write_text("half")
    train_student(settings(inputs, output, resume=True, save_total_limit=99))
    assert not (output / "checkpoint-4" / "stale.safetensors").exists()
    assert "stale" not in (output / "checkpoint-4" / "complete.json").read_text()
    assert_same(output, undisturbed)


def test_an_older_checkpoint_goes_only_once_a_newer_one_is_complete(inputs, undisturbed, tmp_path, monkeypatch):
    """With one to keep, and a failure while the second is completed."""
    output = tmp_path / "out"

    def fail_at_4(folder):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        complete(folder)

    monkeypatch.setattr("emkd.trainer.loop.trainer.complete", fail_at_4)
    with pytest.raises(OSError, match="No space left"):
        train_student(settings(inputs, output, save_total_limit=1))
    assert last_complete(output, lambda line: None) == output / "checkpoint-2"
    monkeypatch.undo()
    train_student(settings(inputs, output, save_total_limit=1, resume=True))
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert_same(output, undisturbed)


def test_a_checkpoint_from_the_future_is_not_the_newest(inputs, undisturbed, every_checkpoint, tmp_path):
    """`save_total_limit: 1` once deleted the newest checkpoints, if an older one had a later time."""
    output = tmp_path / "out"
    shutil.copytree(every_checkpoint / "checkpoint-10", output / "checkpoint-10")
    shutil.copy(every_checkpoint / "run.json", output)
    os.utime(output / "checkpoint-10", (4e9, 4e9))
    train_student(settings(inputs, output, save_total_limit=1, resume=True))
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert_same(output, undisturbed)


def test_nothing_was_complete_yet(inputs, undisturbed, tmp_path, capsys):
    """Killed before or during the first checkpoint: --resume starts at the first step, and logs it."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    for path in output.iterdir():
        if path.name not in ("run.json", "checkpoint-12"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output / "checkpoint-12" / "complete.json").unlink()
    (output / "checkpoint-12").rename(output / "checkpoint-2")
    train_student(settings(inputs, output, resume=True))
    said = capsys.readouterr().err
    assert "checkpoint-2 is incomplete, because the run ended while it was saved: ignoring it" in said
    assert "has no complete checkpoint: starting at the first step" in said
    assert_same(output, undisturbed)
    train_student(settings(inputs, tmp_path / "nothing", resume=True))
    assert "starting at the first step" in capsys.readouterr().err, "a script may always say --resume"
    assert_same(tmp_path / "nothing", undisturbed)
    (output / "run.json").unlink()
    with pytest.raises(InputNotFoundError, match="has no run.json, which says what its run was started with"):
        train_student(settings(inputs, output, resume=True))


def test_a_damaged_run_json_is_refused(inputs, undisturbed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    for content in ("{", "[]", '{"recipe": 5}'):
        (output / "run.json").write_text(content)
        with pytest.raises(DamagedCheckpointError, match="run.json is damaged"):
            train_student(settings(inputs, output, resume=True))


def test_a_run_from_before_there_was_a_cost_compared_logits(inputs, undisturbed, every_checkpoint, tmp_path):
    """Its run.json names no cost; today's default is another."""
    output = tmp_path / "out"
    shutil.copytree(every_checkpoint / "checkpoint-12", output / "checkpoint-12")
    started = json.loads((every_checkpoint / "run.json").read_text())
    del started["recipe"]["losses"]["cost"]
    (output / "run.json").write_text(json.dumps(started))
    with pytest.raises(UsageError, match=r"losses.cost was .*logits.* and is .*log_probabilities"):
        train_student(settings(inputs, output, resume=True))


def test_a_default_may_be_said(inputs, undisturbed, every_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(every_checkpoint / "checkpoint-12", output / "checkpoint-12")
    shutil.copy(every_checkpoint / "run.json", output)
    train_student(settings(inputs, output, resume=True, seed=42, bf16=False, adam_beta1=0.9))
    assert f"resuming from {output}/checkpoint-12" in capsys.readouterr().err
    assert_same(output, undisturbed)


def test_a_damaged_checkpoint_is_refused(inputs, undisturbed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    path = output / "checkpoint-13" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="optimizer.pt is not as it was saved"):
        train_student(settings(inputs, output, resume=True))


def test_weights_alone_cannot_be_resumed_from(inputs, tmp_path):
    output = tmp_path / "out"
    train_student(settings(inputs, output, max_steps=2, save_only_model=True))
    with pytest.raises(UsageError, match="has no optimizer state .*save_only_model"):
        train_student(settings(inputs, output, max_steps=2, save_only_model=True, resume=True))


def test_what_moves_no_weight_may_change_and_does(inputs, undisturbed, every_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(every_checkpoint / "checkpoint-4", output / "checkpoint-4")
    shutil.copy(every_checkpoint / "run.json", output)
    flags = {"save_total_limit": 99, "logging_steps": 4, "save_steps": 5, "dataloader_num_workers": 2}
    train_student(settings(inputs, output, resume=True, **flags))
    assert_same(output, undisturbed)
    steps = [line.split("/")[0] for line in capsys.readouterr().err.splitlines() if ", sup " in line]
    assert steps == ["step 8", "step 12", f"step {STEPS}"]
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 5, 10, STEPS)}
    with pytest.raises(
        UsageError, match=r"recipe.training.learning_rate was 0.003 and is 0.1; .*Use the same settings"
    ):
        train_student(settings(inputs, output, resume=True, learning_rate=0.1, weight_decay=0.5))


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
    "save_total_limit": 99,
}  # fmt: skip


@pytest.fixture
def best_is_4(inputs, data_path, tmp_path, monkeypatch):
    """A run whose best checkpoint is made to be the one of step 4, and its settings."""
    scores = iter([0.1, 0.9, *[0.2] * 50])
    evaluated = lambda *_, **__: {"accuracy": next(scores), "loss": 1.0, "answer_tokens": 1, "skipped_rows": 0}  # noqa: E731
    monkeypatch.setattr("emkd.trainer.loop.trainer.evaluate_answers", evaluated)

    def make(output, **chosen):
        return replace(settings(inputs, output, **{**BEST, "max_steps": 8, **chosen}), eval_data=str(data_path))

    train_student(make(tmp_path / "first"))
    assert_same(tmp_path / "first", tmp_path / "first" / "checkpoint-4")
    return make, tmp_path / "first"


def test_the_best_one_of_a_folder_that_was_moved(best_is_4, tmp_path):
    make, first = best_is_4
    first.rename(tmp_path / "moved")
    (tmp_path / "moved" / "model.safetensors").unlink()
    train_student(make(tmp_path / "moved", resume=True))
    assert_same(tmp_path / "moved", tmp_path / "moved" / "checkpoint-4")


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_best_one_that_cannot_be_had_is_an_error(best_is_4, harm):
    make, first = best_is_4
    path = first / "checkpoint-4" / "model.safetensors"
    if harm == "missing":
        shutil.rmtree(first / "checkpoint-4")
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedCheckpointError, match="checkpoint-4"):
        train_student(make(first, resume=True))


def test_what_the_best_one_is_chosen_by_cannot_change(best_is_4, tmp_path):
    make, first = best_is_4
    with pytest.raises(UsageError, match="recipe.training.save_steps was 2 and is 4"):
        train_student(make(first, resume=True, save_steps=4, eval_steps=4))
    other = tiny.write_data(tmp_path / "other.parquet", tiny.rows()[:3])
    with pytest.raises(UsageError, match="evaluation data changed"):
        train_student(replace(make(first, resume=True), eval_data=str(other)))


def test_other_data_without_a_cache(inputs, tmp_path):
    """With one, the samples say it; plain fine-tuning has the data alone."""
    sft = {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0}
    plain = settings(inputs, tmp_path / "out", max_steps=2)
    plain = replace(plain, cache=None, recipe=with_flags(plain.recipe, sft))
    train_student(plain)
    other = tiny.write_data(tmp_path / "other.parquet", tiny.rows()[::-1])
    with pytest.raises(UsageError, match="data changed"):
        train_student(replace(plain, data=str(other), resume=True))
