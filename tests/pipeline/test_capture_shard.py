"""Rows come out of the teacher's pass batch by batch, and are written during the next pass."""

import resource
import signal
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch

from emkd.errors import CacheWriteError
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.shared_images import SharedImages
from emkd.pipeline.worker import CaptureWorker, record_bytes
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.index.commit import read_index
from emkd.storage.lifecycle.create import create_cache
from emkd.storage.objects.local import LocalFiles
from emkd.storage.shards.writer import ShardWriter
from tests import tiny
from tests.storage.builders import array_fields

ROWS = 12
# Of tiny.rows(): 26, 41, 11, 30, 45 and 24 tokens, the last half of the rows the same once more.
LONGEST_FIRST = [[4, 10], [1, 7], [3, 9, 0], [6, 5, 11], [2, 8]]
BUDGET = 90


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve rows, with other images in the second six."""
    rows = [
        {**row, "id": f"row-{n}", "images": [tiny.png(10 * n + i) for i in range(len(row["images"]))]}
        for n, row in enumerate(tiny.rows() + tiny.rows())
    ]
    return tiny.write_data(tmp_path_factory.mktemp("twelve") / "rows.parquet", rows)


@pytest.fixture
def worker(teacher_path, data, tmp_path):
    """A worker for one shard of all rows, in a new cache."""
    return begin(teacher_path, data, tmp_path / "cache")


def begin(teacher_path, data, cache, **chosen) -> CaptureWorker:
    settings = JobSettings(
        teacher=str(teacher_path), data=str(data), cache=str(cache), gpus_per_worker=0, top_k=8, answer_top_k=8, logit_error="none",
        batch_tokens=BUDGET, **chosen,
    )  # fmt: skip
    manifest, tokenizer = job_manifest(settings, Dataset(settings.data))
    create_cache(settings.cache, manifest, tokenizer)
    return CaptureWorker(settings, manifest)


def gone() -> bool:
    return all(thread.name != "emkd-write" for thread in threading.enumerate())


def objects_of(cache, below) -> list[str]:
    return [str(path) for path in (cache / below).rglob("*") if path.is_file()]


def before_pass(worker, number, run) -> None:
    """`run` is called before forward pass `number` of the teacher, from 0."""
    calls = []

    def hook(module, args):
        calls.append(None)
        if len(calls) == number + 1:
            run()

    worker._loaded()[0].vlm.model.model.register_forward_pre_hook(hook)


def test_rows_come_as_their_batches_are_done(worker):
    """And the list is in the order of the rows."""
    teacher, dataset = worker._loaded()
    passes, seen = [], []
    teacher.vlm.model.model.register_forward_pre_hook(lambda module, args: passes.append(None))
    for result in teacher.captured(teacher.reading(dataset, range(ROWS))):
        seen.append((len(passes), result.hint.row))
    assert seen == [(n, row) for n, rows in enumerate(LONGEST_FIRST, start=1) for row in rows]
    order = [5, 0, 11, 4]
    assert [result.hint.row for result in teacher.capture(dataset, order)] == order


def test_rows_that_cannot_be_read_come_before_the_first_pass(teacher_path, tmp_path):
    rows = tiny.rows()
    rows[1]["images"][0] = b"broken"
    made = begin(teacher_path, tiny.write_data(tmp_path / "rows.parquet", rows), tmp_path / "cache")
    teacher, dataset = made._loaded()
    found = teacher.captured(teacher.reading(dataset, range(6)))
    first = next(found)
    assert (first.hint.row, first.reason) == (1, "image-broken")
    assert first.text_sha256 == dataset.row(1).text_sha256
    assert sorted(result.hint.row for result in found) == [0, 2, 3, 4, 5]


def test_a_shard_is_what_a_writer_makes_of_all_its_rows_at_once(worker, tmp_path):
    report = worker.capture_shard(0)
    files = LocalFiles(tmp_path / "cache")
    teacher, dataset = worker._loaded()
    writer = ShardWriter(files, 0, "at-once", worker.manifest)
    for row in list(
        teacher.captured(teacher.reading(dataset, range(ROWS)), SharedImages(worker.manifest.teacher.dtype))
    ):
        writer.add(row)
    at_once = writer.finish()
    found = read_index(files, 0)
    assert found.objects == at_once.objects
    assert found.table.equals(at_once.table)
    assert (report.n_samples, report.n_skipped, report.n_halved, report.committed) == (ROWS, 0, 0, True)
    assert gone()


def test_the_report_counts_what_came_of_the_rows(teacher_path, tmp_path):
    rows = tiny.rows()
    rows[1]["images"][0] = b"broken"
    made = begin(teacher_path, tiny.write_data(tmp_path / "rows.parquet", rows), tmp_path / "cache")

    def full():
        torch.empty(1 << 50)

    before_pass(made, 0, full)  # rows 4 and 3, halved
    report = made.capture_shard(0)
    assert (report.n_samples, report.n_skipped, report.n_halved) == (5, 1, 2)
    assert read_index(LocalFiles(tmp_path / "cache"), 0).halvings == {4: 1, 3: 1}


@contextmanager
def files_of_at_most(n_bytes: int):
    """The system refuses to let any file of this process grow further (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_is_an_error_and_leaves_nothing(worker, tmp_path):
    worker.preflight([0])
    with files_of_at_most(64), pytest.raises(CacheWriteError, match=r"shard 0 cannot be written \(File too large\)"):
        worker.capture_shard(0)
    assert objects_of(tmp_path / "cache", "shards") == []
    assert objects_of(tmp_path / "cache", "index") == []
    assert gone()
    assert worker.capture_shard(0).committed, "the worker itself is as good as before"


@pytest.mark.parametrize("number", [0, 2])
def test_an_interrupt_in_the_pass_leaves_nothing(worker, tmp_path, number):
    """Raised as a real signal."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        before_pass(worker, number, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            worker.capture_shard(0)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert objects_of(tmp_path / "cache", "shards") == []
    assert gone()
    assert worker.capture_shard(0).committed


def test_a_device_that_fails_in_the_pass_leaves_nothing(worker, tmp_path):
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    before_pass(worker, 1, fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker.capture_shard(0)
    assert objects_of(tmp_path / "cache", "shards") == []
    assert gone()


class Watched(Encoder):
    """Notes the batches that it has made, without keeping them alive."""

    def __call__(self, sample):
        made = super().__call__(sample)
        self.made.append(weakref.ref(made))
        return made


def test_pixels_and_records_go_with_their_batch(worker):
    """When a batch arrives, no memory of earlier batches is held."""
    teacher, dataset = worker._loaded()
    encoder = teacher.encoder
    teacher.encoder = Watched(encoder.processor, encoder.image_token_id, encoder.max_length)
    teacher.encoder.made, records, waiting = [], [], []
    last = {rows[-1]: rows for rows in LONGEST_FIRST}
    for result in teacher.captured(teacher.reading(dataset, range(ROWS))):
        records.append(weakref.ref(result.record))
        if result.hint.row in last:
            waiting.append(sum(ref() is not None for ref in teacher.encoder.made))
            assert sum(ref() is not None for ref in records) == len(last[result.hint.row])
    assert waiting == [10, 8, 5, 2, 0]


def test_bytes_of_a_row(worker):
    teacher, dataset = worker._loaded()
    (row,) = teacher.capture(dataset, [0])
    arrays = array_fields(row.record).values()
    assert len(arrays) == 10
    assert record_bytes(row) == sum(array.size * array.itemsize for array in arrays) > 16 * 8 * 8
