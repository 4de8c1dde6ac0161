"""A pool of workers that take shards until none is left, or until the job has to stop.

A shard is captured at least once and committed exactly once: Ray restarts a killed worker and retries its shard, and a
shard that fails all its attempts does not stop the other shards. Four things stop the pool: an interrupt, a folder
that cannot be written, several failures in a row, which single shards do not explain, and more skipped rows than the
job may have.

The driver keeps a count of the shards that are done and the numbers of the failed ones: neither its memory nor its
time per shard grows with the number of shards (`python -m benchmarks.storage.million_samples`).
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
POLL_SECONDS = 0.1  # Ctrl-C is noticed between two polls, so pressing it twice takes two of them


@dataclass
class Outcome:
    """The outcome of the shards.

    n_done:        shards that were committed
    failed:        numbers of the shards that failed
    first_failure: the lowest of these numbers, and the error of that shard
    full:          the folder of the cache could not be written
    left:          numbers of the shards that no worker started
    interrupted:   the user pressed Ctrl-C
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
    """Which worker captures which shard: each captures one shard, and reads the rows of its next shard meanwhile.

    If no shard is left, an idle worker takes one that another worker would have captured next.
    """

    def __init__(self, shards: Sequence[int]) -> None:
        self._waiting = deque(shards)
        self._next: dict[Any, int] = {}

    def __len__(self) -> int:
        """The number of shards that no worker has."""
        return len(self._waiting) + len(self._next)

    def left(self) -> list[int]:
        return sorted([*self._waiting, *self._next.values()])

    def give(self, worker: Any) -> tuple[int, int | None]:
        """(the shard that the worker captures now, the shard whose rows it reads meanwhile or None)"""
        number = self._next.pop(worker, None)
        if number is None:
            number = self._waiting.popleft() if self._waiting else self._next.popitem()[1]
        if self._waiting:
            self._next[worker] = self._waiting.popleft()
        return number, self._next.get(worker)


def run_shards(
    workers: Sequence[Any],
    shards: Sequence[int],
    interrupt: Interrupt,
    show: Callable[[ShardReport], None],
    enough: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Give each worker its next shard when it has finished one. Returns when no worker has a shard.

    show: called with the report of each committed shard
    enough: whether to start no further shard; those in hand are finished
    """
    outcome = Outcome()
    running: dict[Any, tuple[int, Any]] = {}
    idle, to_do, in_a_row = list(workers), Shards(shards), 0

    def goes_on() -> bool:
        stops = interrupt.asked or outcome.full or in_a_row >= FAILURES_IN_A_ROW or enough()
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
