"""What the log lines of a training run say: sums since the last line, added up over all ranks.

loss by name          as the step's total has it (see objective.py), mean over steps
matched_pairs         vision tokens that learnt from one of the teacher's, a step
retained_mass         share of the teacher's probability that the cached top-k holds, mean over its vision tokens
waiting_share         of the time: waiting for data
assignment_share      of the time: solving assignments
samples_per_second    over all ranks, without evaluations and checkpoints
skipped_rows          rows of these steps that could not be used, only where there were any
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Adds up the seconds for which it was open: `with stopwatch: ...`."""

    seconds: float = 0.0
    _started: float = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


@dataclass
class Meter:
    """Of one rank, since the last log line. `losses` stay on the device until they are told: no step waits for them."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    retained: list[torch.Tensor] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    pairs: int = 0
    skipped: int = 0
    waiting: Stopwatch = field(default_factory=Stopwatch)
    assignment: Stopwatch = field(default_factory=Stopwatch)
    _started: float = field(default_factory=time.perf_counter)

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        self.losses[name] = self.losses.get(name, 0) + value.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, time does not pass: evaluations and checkpoints are no part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began

    def readings(self, add_up: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """The numbers of a log line. `add_up` sums a float32 vector over ranks; all of them have to call this."""
        masses = torch.cat(self.retained) if self.retained else torch.zeros(0)
        seconds = time.perf_counter() - self._started
        own = [self.samples, self.pairs, self.skipped, self.waiting.seconds, self.assignment.seconds, seconds, 1.0]
        losses = [float(value) for value in self.losses.values()]
        own = [*own, float(masses.double().sum()), len(masses), *losses]
        # float64 is nothing that every accelerator has, and the sums are small
        sums = add_up(torch.tensor(own, dtype=torch.float32, device=device)).tolist()
        samples, pairs, skipped, waiting, assignment, seconds, ranks, mass, tokens = sums[:9]
        steps = max(1, self.steps)
        told = {name: value / steps for name, value in zip(self.losses, sums[9:], strict=True)}
        if tokens:
            told |= {"matched_pairs": pairs / steps, "retained_mass": mass / tokens}
            told |= {"assignment_share": assignment / seconds}
        told |= {"waiting_share": waiting / seconds, "samples_per_second": samples * ranks / seconds}
        return told | ({"skipped_rows": skipped} if skipped else {})
