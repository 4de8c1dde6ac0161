"""The rows of a shard are read during the passes over the previous shard, with the same results."""

import threading
import time
from itertools import pairwise

import pytest

from emkd.errors import DataFormatError
from emkd.pipeline.read_ahead import ReadAhead
from emkd.pipeline.row_reader import RowReader
from emkd.pipeline.shard_pool import Shards
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.index.commit import read_index
from emkd.storage.objects.local import LocalFiles
from emkd.vlm.loading import load
from tests.pipeline.test_capture_shard import ROWS, before_pass, begin, data  # noqa: F401

N = 6  # rows of tiny.rows()
SECONDS = 60  # to wait for another thread before it is called stuck
AHEAD = "emkd-read-ahead"


@pytest.fixture
def dataset(data_path):
    return Dataset(str(data_path))


@pytest.fixture(scope="module")
def encoder(teacher_path):
    vlm = load(str(teacher_path))
    return Encoder(vlm.processor, vlm.image_token_id)


class Lacking(Encoder):
    """Runs out of memory at the second row, as long as `lacking`."""

    calls, lacking = 0, True

    def __call__(self, sample):
        self.calls += 1
        if self.calls >= 2 and self.lacking:
            raise MemoryError("Unable to allocate 8.00 PiB")
        return super().__call__(sample)


def rows_of(reading: RowReader) -> list[int]:
    return [row.hint.row for row in reading.usable]


def test_a_limit_ends_it_and_the_rest_is_read_later(dataset, encoder):
    reading = RowReader(encoder, dataset, range(N))
    first = encoder(dataset.sample(0))
    assert first.n_bytes == sum(tensor.numel() * tensor.element_size() for tensor in first.inputs.values()) > 24 * 24
    reading.advance(first.n_bytes - 1)
    assert (rows_of(reading), reading.n_bytes) == ([0], first.n_bytes)
    reading.advance(first.n_bytes)
    assert rows_of(reading) == [0, 1]
    reading.advance()
    assert rows_of(reading) == list(range(N))
    assert [row.text_sha256 for row in reading.usable] == list(dataset.text_hashes())


def test_a_row_for_which_memory_lacks_now_is_read_again(dataset, encoder):
    """While reading ahead, the teacher's pass uses the memory, so the row must not be skipped; in its own shard's turn
    it is."""
    lacking = Lacking(encoder.processor, encoder.image_token_id)
    reading = RowReader(lacking, dataset, range(N))
    reading.advance(1 << 40)
    assert (rows_of(reading), reading.skipped) == ([0], [])
    lacking.lacking = False
    reading.advance()
    assert (rows_of(reading), reading.skipped) == (list(range(N)), [])
    lacking.lacking, lacking.calls = True, 0
    alone = RowReader(lacking, dataset, range(2))
    alone.advance()
    assert [(row.hint.row, row.reason) for row in alone.skipped] == [(1, "out-of-memory")]


class Threads(Encoder):
    """Notes which thread has encoded which sample, and waits if asked to. For one thread at a time, like tokenizers."""

    def __call__(self, sample):
        assert self.free.acquire(blocking=False), "two threads at once"
        try:
            self.seen.append((sample.id, threading.current_thread().name.startswith(AHEAD)))
            self.began.set()
            assert self.go_on.wait(SECONDS)
            return super().__call__(sample)
        finally:
            self.free.release()


def threads(encoder: Encoder) -> Threads:
    made = Threads(encoder.processor, encoder.image_token_id, encoder.max_length)
    made.seen, made.began, made.go_on, made.free = [], threading.Event(), threading.Event(), threading.Lock()
    made.go_on.set()
    return made


def test_what_was_begun_is_taken(dataset, encoder):
    watched = threads(encoder)
    ahead = ReadAhead(lambda number: RowReader(watched, dataset, [number]), 1 << 40)
    ahead.start(3)
    with pytest.raises(ValueError, match="shard 3 was started and not taken"):
        ahead.start(4)
    assert rows_of(ahead.take(3)) == [3]
    assert watched.seen == [(dataset.row(3).id, True)]
    assert rows_of(ahead.take(3)) == [], "reading starts again"


def test_what_was_begun_for_nothing_is_dropped(dataset, encoder):
    """And its reading stops: another worker reads it."""
    watched = threads(encoder)
    ahead = ReadAhead(lambda number: RowReader(watched, dataset, [number, number + 1]), 1 << 40)
    watched.go_on.clear()
    ahead.start(0)
    assert watched.began.wait(SECONDS)
    threading.Timer(0.2, watched.go_on.set).start()
    other = ahead.take(4)
    other.advance()
    assert rows_of(other) == [4, 5]
    assert watched.seen == [(dataset.row(0).id, True), (dataset.row(4).id, False), (dataset.row(5).id, False)]


def test_an_error_belongs_to_its_shard(dataset, encoder):
    class Gone(Dataset):
        def row(self, row):
            if row == 2:
                raise DataFormatError("the disk is gone")
            return super().row(row)

    gone = Gone(dataset.data)
    ahead = ReadAhead(lambda number: RowReader(encoder, gone, [number]), 1 << 40)
    for asked, begun in ((1, 2), (2, 3)):
        ahead.start(begun)
        assert ahead.take(asked).usable == []
    ahead.start(2)
    with pytest.raises(DataFormatError, match="the disk is gone"):
        ahead.take(2)
    assert rows_of(ahead.take(2)) == []


def wait_until(true) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("asked", [[0, 1, 2], [0, 2, 1]], ids=["as-told", "otherwise"])
def test_shards_are_the_same_and_their_rows_are_read_behind_the_passes(teacher_path, data, tmp_path, asked):  # noqa: F811
    """The teacher's first pass does not end before a row of shard 1 is read."""
    alone = begin(teacher_path, data, tmp_path / "alone", rows_per_shard=4)
    ahead = begin(teacher_path, data, tmp_path / "ahead", rows_per_shard=4)
    for number in range(3):
        alone.capture_shard(number)
    teacher, dataset = ahead._loaded()
    watched = teacher.encoder = threads(teacher.encoder)
    before_pass(ahead, 0, lambda: wait_until(lambda: any(behind for _, behind in watched.seen)))
    for number, following in ((asked[0], 1), (asked[1], 2), (asked[2], None)):
        assert ahead.capture_shard(number, following).n_samples == 4
    behind = {name for name, ahead_of_time in watched.seen if ahead_of_time}
    read_by = {
        number: [dataset.row(row).id in behind for row in range(4 * number, 4 * number + 4)] for number in range(3)
    }
    assert not any(read_by[0])
    assert read_by[1][0]
    if asked == [0, 1, 2]:
        assert all(read_by[1] + read_by[2])
        assert len(watched.seen) == ROWS, "each row was read once"
    for number in range(3):
        found, expected = (read_index(LocalFiles(tmp_path / name), number) for name in ("ahead", "alone"))
        assert found.objects == expected.objects
        assert found.table.equals(expected.table)


def test_each_worker_is_told_what_it_does_next():
    shards, told = Shards(range(7)), []
    for worker in "abababa":
        told.append((worker, *shards.give(worker)))
    assert sorted(number for _, number, _ in told) == list(range(7))
    for worker in "ab":
        own = [(number, following) for name, number, following in told if name == worker]
        assert all(following == after[0] for (_, following), after in pairwise(own)), own
    assert (len(shards), shards.left()) == (0, [])


def test_a_shard_that_is_next_for_one_worker_is_not_waited_for():
    shards = Shards(range(4))
    assert [shards.give("slow"), shards.give("fast")] == [(0, 1), (2, 3)]
    assert shards.give("fast") == (3, None)
    assert (len(shards), shards.left()) == (1, [1])
    assert shards.give("fast") == (1, None)
    assert (len(shards), shards.left()) == (0, [])
