"""A pool of workers that pull shards until none is left, or until going on makes no sense.

A shard is captured at least once and committed exactly once: a killed worker is restarted and its shard tried
again, and a shard that fails for good does not stop the others. Three things do: an interrupt, a place that cannot
be written, and failures one after the other, which are no longer the fault of single shards.

Of a shard that is done nothing is kept but that it was, and of a failed one its number: neither the memory of the
driver nor the time that it takes for a shard grows with their number (`python benchmarks/scale.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from emkd.errors import CacheWriteError, EmkdError
from emkd.interrupt import Interrupt
from emkd.pipeline.cluster import result_of
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


def pull(
    workers: Sequence[Any], shards: Sequence[int], interrupt: Interrupt, show: Callable[[ShardReport], None]
) -> Outcome:
    """Give each worker its next shard when it is done with one; returns when nothing is in hand any more."""
    outcome = Outcome()
    running: dict[Any, tuple[int, Any]] = {}
    idle, begun, in_a_row = list(workers), 0, 0

    def goes_on() -> bool:
        stops = interrupt.asked or outcome.full or in_a_row >= FAILURES_IN_A_ROW
        return begun < len(shards) and not stops

    while running or goes_on():
        while idle and goes_on():
            worker, number = idle.pop(), shards[begun]
            begun += 1
            running[worker.capture_shard.remote(number)] = (number, worker)
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
    outcome.left = list(shards[begun:])
    outcome.interrupted = interrupt.asked
    return outcome
