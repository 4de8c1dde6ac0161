"""Runs that are killed, stopped and resumed: their recipe, and `emkd train-student` in its own process.

The student has dropout, so that a random state that is not restored shows; steps accumulate two micro-batches, and
epochs end in the middle of the run.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from emkd.trainer import TrainSettings, load_recipe, with_flags
from emkd.vlm.loading import load_model

ROOT = Path(__file__).parents[3]
STEPS = 13  # an epoch has three, so that the last epoch is not finished
RECIPE = {
    "student": {"vision_pool": 2},
    "window": 1,
    "training": {
        "max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3, "lr_scheduler_type": "constant_with_warmup", "logging_steps": 1, "save_steps": 2, "save_total_limit": 2, "warmup_steps": 3,
    },
}  # fmt: skip


def settings(inputs, output, *, resume=False, **flags):
    recipe = with_flags(load_recipe(inputs["recipe"]), {f"training.{name}": value for name, value in flags.items()})
    return TrainSettings(**{**inputs, "recipe": recipe, "output": output, "resume": resume})


def weights(folder):
    return load_model(folder, dtype="auto").state_dict()


def assert_same(folder, expected):
    found, whole = weights(folder), weights(expected)
    assert set(found) == set(whole)
    assert [name for name in whole if not torch.equal(found[name], whole[name])] == []


# emkd with steps of at least so many seconds, so that a signal comes in the middle of one.
SLOW = """
import sys, time
from emkd.trainer.objective.objective import Objective

call = Objective.__call__

def slow(*given):
    print("micro-batch", file=sys.stderr, flush=True)
    time.sleep({seconds})
    return call(*given)

Objective.__call__ = slow
from emkd.cli import main

if __name__ == "__main__":
    main()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Run:
    """`emkd train-student` in its own process, or in several below torchrun; the first of a group of processes.

    seconds: that a micro-batch takes at least
    """

    def __init__(
        self, inputs, output, *, resume=False, loader_workers=0, ranks=1, shard=False, seconds=0.0, **training
    ):
        number = time.monotonic_ns()
        recipe = output.with_suffix(f".{number}.yaml")
        chosen = {**RECIPE["training"], "dataloader_num_workers": loader_workers, **training}
        recipe.write_text(yaml.safe_dump({**RECIPE, "training": chosen}))
        self.errors, self.output = output.with_suffix(f".{number}.err"), output
        flags = [f"--{name}={value}" for name, value in {**inputs, "recipe": recipe, "output": output}.items()]
        script = output.with_suffix(f".{number}.py")
        script.write_text(SLOW.format(seconds=seconds))
        launcher = [*TORCHRUN, str(ranks)] if ranks > 1 else []
        switches = ["--resume"] * resume + ["--shard"] * shard
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(script), "train-student", *flags, *switches],
                stderr=stderr, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def signal(self, number):
        """To all processes, as a terminal sends it, and many a cluster."""
        os.killpg(self.process.pid, number)

    def ended(self):
        """The exit code."""
        return self.process.wait(timeout=240)

    def wait_for(self, what):
        deadline = time.monotonic() + 240
        while not what(self) and self.process.poll() is None:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self):
        assert self.process.wait(timeout=240) == 0, self.said()

    def said(self):
        return self.errors.read_text(errors="replace")  # bars are being drawn while it is read

    def steps(self):
        return [
            line.split("/")[0].removeprefix("step ") for line in self.said().splitlines() if line.startswith("step")
        ]
