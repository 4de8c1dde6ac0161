"""A pool of workers that pull shards until none is left, or until going on makes no sense.

A shard is captured at least once and committed exactly once: a killed worker is restarted and its shard tried
again, and a shard that fails for good does not stop the others. Three things do: an interrupt, a place that cannot
be written, and failures one after the other, which are no longer the fault of single shards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from emkd.errors import CacheWriteError, EmkdError
from emkd.pipeline.cluster import result_of
from emkd.pipeline.interrupt import Interrupt
from emkd.pipeline.worker import ShardReport

FAILURES_IN_A_ROW = 3
POLL_SECONDS = 0.1  # Ctrl-C is heard between two polls, and twice only by two of them


@dataclass
class Outcome:
    """What came of the shards: reports, errors by shard, and those that nobody began."""

    done: list[ShardReport] = field(default_factory=list)
    failed: dict[int, EmkdError] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    interrupted: bool = False


def pull(
    workers: Sequence[Any], shards: Sequence[int], interrupt: Interrupt, show: Callable[[ShardReport], None]
) -> Outcome:
    """Give each worker its next shard when it is done with one; returns when nothing is in hand any more."""
    outcome = Outcome(left=list(shards))
    running: dict[Any, tuple[int, Any]] = {}
    idle, in_a_row = list(workers), 0
    while running or (outcome.left and not _stops(outcome, interrupt, in_a_row)):
        while idle and outcome.left and not _stops(outcome, interrupt, in_a_row):
            worker, number = idle.pop(), outcome.left.pop(0)
            running[worker.capture_shard.remote(number)] = (number, worker)
        finished, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for reference in finished:
            number, worker = running.pop(reference)
            idle.append(worker)
            try:
                report: ShardReport = result_of(reference)
            except EmkdError as error:
                outcome.failed[number] = error
                in_a_row += 1
            else:
                outcome.done.append(report)
                in_a_row = 0
                show(report)
    outcome.interrupted = interrupt.asked
    return outcome


def _stops(outcome: Outcome, interrupt: Interrupt, in_a_row: int) -> bool:
    full = any(isinstance(error, CacheWriteError) for error in outcome.failed.values())
    return interrupt.asked or full or in_a_row >= FAILURES_IN_A_ROW
