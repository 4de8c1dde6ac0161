"""The pool of workers, with real actors whose shards end in given ways."""

import gc
import signal
import weakref
from typing import Any

import pytest
import ray

from emkd.errors import CacheWriteError, JobFailedError
from emkd.interrupt import Interrupt
from emkd.pipeline.shard_pool import FAILURES_IN_A_ROW, run_shards
from emkd.pipeline.worker import ShardReport

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


class Told:
    """Captures nothing: each shard ends with the error given for it."""

    def __init__(self, ends: dict[int, Exception]) -> None:
        self.ends = ends
        self.asked: list[tuple[int, int | None]] = []

    def all_asked(self) -> list[tuple[int, int | None]]:
        return self.asked

    def capture_shard(self, number: int, following: int | None = None) -> ShardReport:
        self.asked.append((number, following))
        if number in self.ends:
            raise self.ends[number]
        return ShardReport(
            number=number, committed=True, n_samples=1, n_skipped=0, n_halved=0, n_shared=0, n_different=0, n_bytes=1, seconds=0.0
        )  # fmt: skip


@pytest.fixture(scope="module")
def session():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def run(ends: dict[int, Exception], n_workers: int = 1, stop_after: int | None = None) -> tuple[Any, list[int]]:
    workers = [ray.remote(Told).remote(ends) for _ in range(n_workers)]
    interrupt, shown = Interrupt(lambda number: None), []

    def show(report: ShardReport) -> None:
        shown.append(report.number)
        if len(shown) == stop_after:
            interrupt.ask(signal.SIGINT)

    return run_shards(workers, range(10), interrupt, show), shown


@pytest.mark.parametrize("n_workers", [1, 2])
def test_every_shard_is_done_once(session, n_workers):
    outcome, shown = run({}, n_workers)
    assert sorted(shown) == list(range(10))
    assert (outcome.n_done, outcome.failed, outcome.left, outcome.interrupted) == (10, [], [], False)


def test_a_worker_is_told_what_to_read_meanwhile(session):
    worker = ray.remote(Told).remote({})
    run_shards([worker], range(4), Interrupt(lambda number: None), lambda report: None)
    assert ray.get(worker.all_asked.remote()) == [(0, 1), (1, 2), (2, 3), (3, None)]


def test_nothing_is_kept_of_a_shard_that_is_done(session):
    """The driver of 100,000 shards must not grow with them."""
    seen: list[weakref.ref] = []
    outcome = run_shards(
        [ray.remote(Told).remote({})],
        range(10),
        Interrupt(lambda number: None),
        lambda report: seen.append(weakref.ref(report)),
    )
    gc.collect()
    assert [ref() for ref in seen] == [None] * 10
    assert outcome.n_done == 10


def test_an_error_that_is_no_workers_own_arrives_as_it_is(session):
    outcome, _ = run({7: JobFailedError("broken")})
    assert (outcome.first_failure[0], str(outcome.first_failure[1])) == (7, "broken")


def test_single_failures_do_not_stop_the_others(session):
    outcome, shown = run({2: ValueError("odd"), 3: ValueError("odd"), 7: JobFailedError("broken")})
    assert shown == [0, 1, 4, 5, 6, 8, 9]
    assert (outcome.n_done, outcome.failed) == (7, [2, 3, 7])
    assert outcome.first_failure[0] == 2
    assert "a worker failed: ValueError: odd" in str(outcome.first_failure[1])
    assert outcome.left == []


def test_failures_in_a_row_stop_the_job(session):
    outcome, shown = run({number: ValueError("gone") for number in range(2, 10)})
    assert shown == [0, 1]
    assert outcome.failed == list(range(2, 2 + FAILURES_IN_A_ROW))
    assert outcome.left == list(range(2 + FAILURES_IN_A_ROW, 10))


def test_a_place_that_cannot_be_written_stops_the_job(session):
    outcome, shown = run({4: CacheWriteError("full")})
    assert shown == [0, 1, 2, 3]
    assert (outcome.failed, outcome.full) == ([4], True)
    assert isinstance(outcome.first_failure[1], CacheWriteError)
    assert outcome.left == [5, 6, 7, 8, 9]


def test_an_interrupt_finishes_what_is_in_hand(session):
    outcome, shown = run({}, n_workers=2, stop_after=4)
    assert outcome.interrupted
    assert 4 <= len(shown) <= 5, "the other worker's shard is finished, too"
    assert sorted(shown + outcome.left) == list(range(10))
