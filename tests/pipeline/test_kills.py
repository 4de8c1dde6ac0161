"""Worker and driver of the whole Ray job are killed at random moments, and two jobs run concurrently: nothing committed is
lost, and the final cache equals the cache of an undisturbed job."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from emkd.storage.cache import Cache, verify
from emkd.storage.index.commit import read_index
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import committed_shards
from tests import tiny

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 40  # and as many shards, so that a shard is always in progress


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty rows, one of them broken."""
    found = []
    for number in range(ROWS):
        row = tiny.rows()[number % 6]
        images = [tiny.png(100 * number + n) for n in range(len(row["images"]))]
        found.append({**row, "id": f"row-{number}", "images": images})
    found[7]["images"][0] = b"broken"
    return tiny.write_data(tmp_path_factory.mktemp("kills") / "rows.parquet", found)


@pytest.fixture(scope="module")
def undisturbed(teacher_path, data, tmp_path_factory) -> dict[int, object]:
    """The objects of each shard, made without Ray. The command stores codes by default, and makes the same basis."""
    cache = tiny.make_cache(
        teacher_path, data, tmp_path_factory.mktemp("undisturbed") / "cache", top_k=8, answer_top_k=8,
        precision="bfloat16", affinity_precision="int8", rows_per_shard=1, logit_error=0.8,
    )  # fmt: skip
    return objects(cache)


def objects(cache: Path) -> dict[int, object]:
    files = LocalFiles(cache)
    return {
        shard: (dict(index.objects), index.table)
        for shard in committed_shards(files)
        for index in [read_index(files, shard)]
    }


class Job:
    """`emkd cache-teacher` in its own process and process group."""

    def __init__(self, teacher: Path, data: Path, cache: Path, *more: str) -> None:
        self.cache = cache
        self.errors = cache.with_suffix(f".{time.monotonic_ns()}.err")
        flags = [
            "--gpus-per-worker",
            "0",
            "--rows-per-shard",
            "1",
            "--top-k",
            "8",
            "--answer-top-k",
            "8",
            "--max-skipped",
            "0.1",
        ]
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "emkd.cli", "cache-teacher", "--teacher", str(teacher), "--data", str(data),
                 "--cache", str(cache), *flags, *more],
                stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def wait_for_shards(self, count: int) -> None:
        """Until so many shards are committed, or the job has ended."""
        deadline = time.monotonic() + 180
        while len(list(self.cache.glob("index/*.parquet"))) < count and self.process.poll() is None:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)

    def worker(self) -> psutil.Process | None:
        """The actor that holds the teacher, None between two of its lives."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
            return next(filter(is_worker, below), None)
        except psutil.NoSuchProcess:
            return None

    def kill(self) -> None:
        """Kill the driver; its workers end a moment later (Ray's agents take a minute)."""
        workers = [p for p in psutil.Process(self.process.pid).children(recursive=True) if is_worker(p)]
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive, "a teacher outlives its driver"

    def finish(self) -> None:
        self.process.wait(timeout=240)
        assert self.process.returncode == 0, self.said()

    def said(self) -> str:
        return self.errors.read_text()[-3000:]


def is_worker(process: psutil.Process) -> bool:
    """Whether it is an actor that holds the teacher."""
    return any("CaptureWorker" in part for part in process.cmdline())


def check(cache: Path, undisturbed: dict[int, object]) -> None:
    """Sealed, whole, each row once or skipped with its reason, shards bit-equal."""
    opened = Cache.open(cache)
    assert verify(cache) == []
    skipped = {entry["row"]: entry["reason"] for entry in opened.skipped.to_pylist()}
    assert skipped == {7: "image-broken"}
    assert opened.sample_rows.tolist() == [row for row in range(ROWS) if row != 7]
    assert objects(cache) == undisturbed


def test_the_driver_is_killed_again_and_again(teacher_path, data, undisturbed, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cache = tmp_path / "cache"
    done: dict[int, object] = {}
    for _ in range(3):
        job = Job(teacher_path, data, cache)
        job.wait_for_shards(len(done) + chance.randint(1, 6))
        time.sleep(chance.random() * 0.03)
        job.kill()
        seen = objects(cache)
        assert {shard: seen[shard] for shard in done} == done, "what was committed stays as it was"
        assert verify(cache) == []
        assert len(seen) == len(Cache.open(cache, partial=True).shards)
        done = seen
    assert 0 < len(done) < ROWS, "killed too late to show anything"
    Job(teacher_path, data, cache).finish()
    check(cache, undisturbed)


def test_the_worker_is_killed_again_and_again(teacher_path, data, undisturbed, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    cache = tmp_path / "cache"
    job = Job(teacher_path, data, cache)
    killed = 0
    for count in sorted(chance.sample(range(1, ROWS - 2), 3)):
        job.wait_for_shards(count)
        time.sleep(chance.random() * 0.05)
        worker = job.worker()
        if worker is not None:
            worker.kill()
            killed += 1
    job.finish()
    assert killed, "no worker was found to kill"
    check(cache, undisturbed)


def test_two_jobs_at_once(teacher_path, data, undisturbed, tmp_path):
    cache = tmp_path / "cache"
    jobs = [Job(teacher_path, data, cache), Job(teacher_path, data, cache)]
    for job in jobs:
        job.finish()
    check(cache, undisturbed)
    before = set(LocalFiles(cache).names())
    Job(teacher_path, data, cache).finish()
    assert set(LocalFiles(cache).names()) == before, "only --clean removes anything"
    Job(teacher_path, data, cache, "--clean").finish()
    read = {name for shard in committed_shards(LocalFiles(cache)) for name in _names(cache, shard)}
    assert set(LocalFiles(cache).names("shards")) == read
    check(cache, undisturbed)


def _names(cache: Path, shard: int) -> set[str]:
    index = read_index(LocalFiles(cache), shard)
    return {f"{index.prefix}/{name}" for name in index.objects}


def test_ctrl_c_once_finishes_the_shards_in_hand(teacher_path, data, undisturbed, tmp_path):
    cache = tmp_path / "cache"
    job = Job(teacher_path, data, cache)
    job.wait_for_shards(3)
    os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does: to the whole process group
    job.process.wait(timeout=60)
    said = job.said()
    assert job.process.returncode == 130, said
    assert "finishing the current shards; press Ctrl-C again to stop immediately" in said
    left = committed_shards(LocalFiles(cache))
    assert 3 <= len(left) < ROWS
    assert f"{len(left)} of {ROWS} shards were committed; run the same command again to compute the other" in said
    assert "Traceback" not in said
    assert len(list((cache / "shards").iterdir())) == len(left), "nothing is left half done"
    Job(teacher_path, data, cache).finish()
    check(cache, undisturbed)


def test_ctrl_c_twice_stops_at_once(teacher_path, data, tmp_path):
    """The worker is halted, so that the current shard never ends."""
    cache = tmp_path / "cache"
    job = Job(teacher_path, data, cache)
    job.wait_for_shards(3)
    job.worker().suspend()
    time.sleep(2)  # a report that was on its way has come, and the driver has given the halted worker its next shard
    os.killpg(job.process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(timeout=3)
    os.killpg(job.process.pid, signal.SIGINT)
    job.process.wait(timeout=60)
    said = job.said()
    assert job.process.returncode == 130, said
    assert "finishing the current shards" in said
    assert "emkd: interrupted" in said
    assert "Traceback" not in said
    assert len(committed_shards(LocalFiles(cache))) >= 3
    assert verify(cache) == []
