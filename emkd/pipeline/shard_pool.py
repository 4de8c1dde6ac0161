"""A pool of workers that pull shards until none is left, or until going on makes no sense.

A shard is captured at least once and committed exactly once: a killed worker is restarted and its shard tried
again, and a shard that fails for good does not stop the others. Three things do: an interrupt, a place that cannot
be written, and failures one after the other, which are no longer the fault of single shards.

Of a shard that is done nothing is kept but that it was, and of a failed one its number: neither the memory of the
driver nor the time that it takes for a shard grows with their number (`python benchmarks/scale.py`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from emkd.errors import CacheWriteError, EmkdError
from emkd.interrupt import Interrupt
from emkd.pipeline.actors import result_of
from emkd.pipeline.worker import ShardReport

FAILURES_IN_A_ROW = 3
POLL_SECONDS = 0.1  # Ctrl-C is heard between two polls, and twice only by two of them


@dataclass
class Outcome:
    """What came of the shards: how many are done, which ones failed, and which nobody began.

    `first_failure` is the lowest of the failed numbers and what that shard ended with; `full` says that a place could
    not be written.
    """

    n_done: int = 0
    failed: list[int] = field(default_factory=list)
    first_failure: tuple[int, EmkdError] | None = None
    full: bool = False
    left: Sequence[int] = ()
    interrupted: bool = False

    def fail(self, number: int, error: EmkdError) -> None:
        self.failed.append(number)
        if self.first_failure is None or number < self.first_failure[0]:
            self.first_failure = (number, error)
        self.full = self.full or isinstance(error, CacheWriteError)


class Shards:
    """Who does which shard: each worker has one in hand and reads the rows of its next one meanwhile.

    A worker that is idle while none is left takes one that another worker would have done next.
    """

    def __init__(self, shards: Sequence[int]) -> None:
        self._waiting = deque(shards)
        self._next: dict[Any, int] = {}

    def __len__(self) -> int:
        """Shards that nobody has in hand."""
        return len(self._waiting) + len(self._next)

    def left(self) -> list[int]:
        return sorted([*self._waiting, *self._next.values()])

    def give(self, worker: Any) -> tuple[int, int | None]:
        """The shard that the worker does now, and the one to read meanwhile, where there is one."""
        number = self._next.pop(worker, None)
        if number is None:
            number = self._waiting.popleft() if self._waiting else self._next.popitem()[1]
        if self._waiting:
            self._next[worker] = self._waiting.popleft()
        return number, self._next.get(worker)


def run_shards(
    workers: Sequence[Any], shards: Sequence[int], interrupt: Interrupt, show: Callable[[ShardReport], None]
) -> Outcome:
    """Give each worker its next shard when it is done with one; returns when nothing is in hand any more."""
    outcome = Outcome()
    running: dict[Any, tuple[int, Any]] = {}
    idle, to_do, in_a_row = list(workers), Shards(shards), 0

    def goes_on() -> bool:
        stops = interrupt.asked or outcome.full or in_a_row >= FAILURES_IN_A_ROW
        return len(to_do) > 0 and not stops

    while running or goes_on():
        while idle and goes_on():
            worker = idle.pop()
            number, following = to_do.give(worker)
            running[worker.capture_shard.remote(number, following)] = (number, worker)
        finished, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for reference in finished:
            number, worker = running.pop(reference)
            idle.append(worker)
            try:
                report: ShardReport = result_of(reference)
            except EmkdError as error:
                outcome.fail(number, error)
                in_a_row += 1
            else:
                outcome.n_done += 1
                in_a_row = 0
                show(report)
    outcome.left = to_do.left()
    outcome.interrupted = interrupt.asked
    return outcome
