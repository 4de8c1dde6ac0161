"""Stopping a run by SIGINT or SIGTERM: after the step in hand, on all ranks at the same step, with a checkpoint.

    signal -> Interrupt.ask -> Stopping.announce      says how long it takes
    get_batch_samples -> votes, agreed                all ranks learn of it in the sum that they form anyway
    DistillationTrainer stops: checkpoint, StoppedError

With several ranks, the ranks meet when the micro-batches of the next step are read, which are then left untrained: a
sum of its own at a step's end would make the device wait at each step.
"""

import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from emkd.interrupt import NAMES, Interrupt, again
from emkd.trainer.report import log

PROBE_BYTES = 1 << 23

WHAT_NEXT = {
    "start": "stopping before the first step of this call, which has nothing to save yet",
    "step": "stopping after this step; a checkpoint is saved in about {}",
    "evaluation": "stopping after this evaluation; then a checkpoint is saved in about {}",
    "checkpoint": "stopping once this checkpoint is saved, in about {}",
}


class Stopping:
    """A request to stop, and how long it takes to fulfil it.

    output:       the run's folder, to which checkpoints are written
    n_bytes:      returns the size of a checkpoint
    step_seconds: returns the mean seconds of the last steps
    doing:        what the run does now: a key of WHAT_NEXT
    """

    def __init__(self, output: Path, n_bytes: Callable[[], int], step_seconds: Callable[[], float]) -> None:
        self.output, self.n_bytes, self.step_seconds = output, n_bytes, step_seconds
        self.interrupt = Interrupt(self.announce)
        self.doing = "start"
        self._last_save: float | None = None  # seconds

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Note what the run does while open; measure checkpoints."""
        before, began = self.doing, time.perf_counter()
        self.doing = doing
        try:
            yield
        finally:
            self.doing = before
        if doing == "checkpoint":
            self._last_save = time.perf_counter() - began

    def announce(self, number: int) -> None:
        """Say what is done before the run stops, and how to stop it at once."""
        seconds = "" if self.doing == "start" else self._seconds()
        log(f"\n{NAMES[number]}: {WHAT_NEXT[self.doing].format(seconds)}; {again(number)} to stop at once")

    def _seconds(self) -> str:
        """Return the seconds until the checkpoint is complete, in words."""
        saving = self._last_save
        if saving is None:
            rate = write_rate(self.output)
            if rate is None:
                return "an unknown time, because the output folder cannot be written now"
            saving = self.n_bytes() / rate
        return f"{max(1, math.ceil(saving + (self.step_seconds() if self.doing == 'step' else 0)))} s"

    def votes(self) -> torch.Tensor:
        """Return [2] int64, to be summed over ranks: whether this rank has had SIGINT, and SIGTERM."""
        return torch.tensor([int(self.interrupt.signal == number) for number in (signal.SIGINT, signal.SIGTERM)])


def agreed(votes: list[int]) -> int:
    """Return the signal that the ranks agree on, from the sum of their `votes`; 0 if none has had any."""
    interrupted, terminated = votes
    return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0


def write_rate(folder: Path) -> float | None:
    """Return how many bytes a second are written, synced and hashed in a folder, measured; None if it is impossible."""
    probe, content = folder / f".probe-{os.getpid()}", os.urandom(PROBE_BYTES)
    began = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        hashlib.sha256(probe.read_bytes())
    except OSError:
        return None
    finally:
        probe.unlink(missing_ok=True)
    return PROBE_BYTES / (time.perf_counter() - began)


def keep_worker_alive(_: int) -> None:
    """Let a loader's worker outlive the signals that a terminal or a cluster sends to all processes of a run.

    Its main process still needs batches. SIGTERM from the main process itself, which so ends its workers, ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="emkd-sigterm", daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
