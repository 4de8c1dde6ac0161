"""The numbers of a training run's log lines: sums since the last line, over all ranks.

sup, rld, vsd, vlad   each loss as it enters the step's total (see objective.py), mean over steps
matched_pairs         pairs of student and teacher vision tokens, per step
retained_mass         share of the teacher's probability that the cached top-k holds, mean over its vision tokens
lacking_mass          share that the top-k gives to ids that the student lacks; left out if it is 0
answer_lacking_mass   the same for answer tokens
padding_share         share of padding among all positions of the batches; left out if it is 0
waiting_share         share of the time spent waiting for data
assignment_share      share of the time spent solving assignments
samples_per_second    over all ranks; evaluations and checkpoints do not count as time
skipped_rows          rows of these steps that were skipped; left out if there were none
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from emkd.trainer.matching.stopwatch import Stopwatch


@dataclass
class Meter:
    """Sums of one rank since the last log line.

    Losses stay on the device until they are read, so that no step waits for them.
    """

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    retained_mass: torch.Tensor | float = 0.0
    lacking_mass: torch.Tensor | float = 0.0
    answer_lacking_mass: torch.Tensor | float = 0.0
    vision_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    samples: int = 0
    pairs: int = 0
    skipped: int = 0
    positions: int = 0
    padding: int = 0
    waiting: Stopwatch = field(default_factory=Stopwatch)
    assignment: Stopwatch = field(default_factory=Stopwatch)
    _started: float | None = None

    def begin_step(self) -> None:
        """Count a step; the clock starts with the first one."""
        self.steps += 1
        self._started = self._started or time.perf_counter()

    @property
    def step_seconds(self) -> float:
        """Mean seconds of the steps; 0 before the first."""
        return (time.perf_counter() - self._started) / self.steps if self._started is not None else 0.0

    @property
    def waiting_share(self) -> float | None:
        """Share of the time of these steps spent waiting for data; None before the first."""
        return self.waiting.seconds / (self.step_seconds * self.steps) if self._started is not None else None

    def add_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Count the positions of a micro-batch, [B, T], and those that are padding."""
        mask = inputs.get("attention_mask")
        if mask is None:  # a processor that gives none says nothing about padding
            return
        self.positions += mask.numel()
        self.padding += int((mask == 0).sum())

    def add(
        self,
        losses: Mapping[str, torch.Tensor],
        retained_mass: torch.Tensor,
        lacking_mass: torch.Tensor,
        answer_lacking_mass: torch.Tensor,
    ) -> None:
        """Add a micro-batch.

        losses: scalars by name;  retained_mass, lacking_mass: [teacher's vision tokens]
        answer_lacking_mass: [answer tokens]
        """
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach()
        self.retained_mass = self.retained_mass + retained_mass.sum()
        self.lacking_mass = self.lacking_mass + lacking_mass.sum()
        self.vision_tokens += len(retained_mass)
        self.answer_lacking_mass = self.answer_lacking_mass + answer_lacking_mass.sum()
        self.answer_tokens += len(answer_lacking_mass)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while open: evaluations and checkpoints are not part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._started is not None:
                self._started += time.perf_counter() - began

    def readings(self, add_up: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """Return the numbers of a log line. `add_up` sums a float32 vector over ranks; all ranks have to call this."""
        seconds = time.perf_counter() - (self._started or time.perf_counter())
        masses = [float(mass) for mass in (self.retained_mass, self.lacking_mass, self.answer_lacking_mass)]
        shared = [self.samples, self.pairs, self.skipped, self.vision_tokens, self.answer_tokens, *masses]
        shared += [self.positions, self.padding]
        spent = [self.waiting.seconds, self.assignment.seconds, seconds]
        own = [1.0, *shared, *spent, *map(float, self.losses.values())]
        sums = add_up(torch.tensor(own, dtype=torch.float32, device=device)).tolist()
        ranks, samples, pairs, skipped, tokens, answers, retained, lacking, answer_lacking, *times = sums[:14]
        positions, padding, waiting, assignment, seconds = times
        found = {name: value / self.steps for name, value in zip(self.losses, sums[14:], strict=True)}
        if tokens:
            found |= {"matched_pairs": pairs / self.steps, "retained_mass": retained / tokens}
            found |= {"lacking_mass": lacking / tokens} if lacking else {}
            found |= {"assignment_share": assignment / seconds}
        found |= {"answer_lacking_mass": answer_lacking / answers} if answer_lacking else {}
        found |= {"padding_share": padding / positions} if padding else {}
        found |= {"waiting_share": waiting / seconds, "samples_per_second": samples * ranks / seconds}
        return found | ({"skipped_rows": skipped} if skipped else {})
