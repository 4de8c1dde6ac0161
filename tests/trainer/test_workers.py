"""`--workers 2`: Ray Train for real, gloo on the CPU, with a worker that is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from emkd.errors import DataFormatError, JobFailedError, OutputExistsError, UsageError
from emkd.trainer import Recipe, TrainSettings, train_student, with_flags
from emkd.trainer.loop.checkpoints import last_complete, step_of
from emkd.vlm.loading import load_model
from tests import tiny

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),  # of Ray's by Ray
]

STEPS = 64  # so many that a worker can be killed in the middle

FLAGS = {
    "training.per_device_train_batch_size": 1, "training.max_steps": STEPS, "training.learning_rate": 3e-3,
    "training.logging_steps": 4, "training.save_steps": 2, "student.vision_pool": 2, "window": 1,
}  # fmt: skip


@pytest.fixture
def settings(student_path, data_path, cache_path, tmp_path):
    def make(output, workers=2, **chosen):
        flags = {**FLAGS, **chosen.pop("flags", {})}
        given = {"student": str(student_path), "data": str(data_path), "cache": str(cache_path)}
        recipe = with_flags(Recipe(), flags)
        return TrainSettings(**{**given, "output": tmp_path / output, "recipe": recipe, "workers": workers, **chosen})

    return make


def weights(folder):
    return load_model(folder, dtype="auto").state_dict()


def below():
    """Processes of Ray Train's workers below this one."""
    return [process for process in psutil.Process(os.getpid()).children(recursive=True) if is_worker(process)]


def is_worker(process):
    try:
        return any("RayTrainWorker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


class Killer(threading.Thread):
    """Kills one of two workers as soon as a checkpoint is complete."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.output, self.killed = output, False

    def run(self) -> None:
        deadline = time.monotonic() + 500
        workers: list[psutil.Process] = []
        looked = 0.0
        while not self.killed and time.monotonic() < deadline:
            if time.monotonic() > looked + 1:  # a walk over all processes takes time that they need
                workers, looked = below(), time.monotonic()
            if len(workers) == 2 and list(self.output.glob("checkpoint-*/complete.json")):
                with contextlib.suppress(psutil.NoSuchProcess):
                    workers[1].send_signal(signal.SIGKILL)
                    self.killed = True
            time.sleep(0.005)


@pytest.mark.parametrize("shard", [False, True])
def test_a_killed_worker_changes_nothing(settings, tmp_path, capsys, shard):
    flags = {"student.shard": shard, "training.max_steps": 32 if shard else STEPS}
    metrics = train_student(settings("undisturbed", eval_data=settings("x").data, flags=flags))
    said = capsys.readouterr().err
    steps = flags["training.max_steps"]
    assert f"{steps} steps of 1 samples x 1 micro-batches x 2 workers on cpu" in said
    assert ("workers on cpu, sharded" in said or "workers on cpu:0, sharded" in said) == shard
    assert f"step {steps}/{steps}" in said
    assert metrics["eval_answer_tokens"] == 27
    assert metrics["train_loss"] > 0
    killer = Killer(tmp_path / "killed")
    killer.start()
    train_student(settings("killed", flags=flags))
    assert killer.killed, "no worker was found to kill"
    assert "a worker died" in capsys.readouterr().err
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "undisturbed")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    with pytest.raises(UsageError, match=r"one process has no other" if shard else r"workers was 2 and is 1"):
        train_student(settings("killed", workers=1, resume=True, flags=flags))


def test_errors_of_ours_come_through_and_are_not_tried_again(settings, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(OutputExistsError):
        train_student(settings("used"))
    rows = tiny.rows()
    rows[3]["images"] = [b"broken"]
    data = tiny.write_data(tmp_path / "bad.parquet", rows)
    sft = {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0}
    with pytest.raises(DataFormatError, match=r"1 of 6 rows cannot be trained on, and max_skipped 0.01 allows 0"):
        train_student(settings("out", data=str(data), cache=None, flags=sft))
    said = capsys.readouterr().err
    assert "row 3 is skipped: image-broken" in said
    assert "a worker died" not in said


def test_no_progress_ends_it(settings, monkeypatch):
    """Each time the ranks log their fourth step, before there is any checkpoint, one of them is killed."""
    killed = []

    def tell(text):
        if text.startswith("step 4/"):
            (first, _) = below()
            first.send_signal(signal.SIGKILL)
            killed.append(first.pid)

    monkeypatch.setattr("emkd.trainer.report.tell", tell)
    with pytest.raises(JobFailedError, match=r"workers died twice without a new checkpoint in between: .*rank \d: .*"):
        train_student(settings("out", flags={"training.max_steps": 10**6, "training.save_strategy": "no"}))
    assert len(set(killed)) == 2


def test_ctrl_c(settings, tmp_path):
    """To the whole process group, as a terminal sends it: a checkpoint of all ranks, exit code 130, no worker left."""
    chosen = settings("out")
    recipe = tmp_path / "recipe.yaml"
    content = {"student": {"vision_pool": 2}, "training": {"max_steps": 100_000, "save_steps": 5, "logging_steps": 5}}
    recipe.write_text(yaml.safe_dump(content))
    arguments = ["--student", chosen.student, "--data", chosen.data, "--cache", chosen.cache, "--recipe", str(recipe)]
    command = [sys.executable, "-m", "emkd.cli", "train-student", *arguments, "--output", str(chosen.output)]
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen([*command, "--workers", "2"], stderr=stderr, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list(chosen.output.glob("checkpoint-*/complete.json")):
        assert process.poll() is None, errors.read_text()[-2000:]
        assert time.monotonic() < deadline, errors.read_text()[-2000:]
        time.sleep(0.05)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if is_worker(p)]
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, errors.read_text()[-2000:]
    said = errors.read_text()
    assert "Ctrl-C: stopping after this step; a checkpoint is saved in about" in said
    newest = last_complete(chosen.output, lambda line: None)
    left = f"emkd: stopped by Ctrl-C after step {step_of(newest)}: {newest} is complete. The same command with --resume"
    assert said.count(left) == 1, said[-2000:]
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
