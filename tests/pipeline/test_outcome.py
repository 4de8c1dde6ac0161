"""How a job ends: the outcome of its shards, and how many rows were skipped. No Ray here."""

import shutil

import pytest

from emkd.errors import DataMismatchError, JobFailedError
from emkd.pipeline import JobSettings
from emkd.pipeline.cache_size import Sizes
from emkd.pipeline.job import _check_outcome, _check_skipped
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.preflight import Estimate
from emkd.pipeline.shard_pool import Outcome
from emkd.pipeline.worker import CaptureWorker
from emkd.samples import Dataset
from emkd.storage.cache import Cache
from tests import tiny

ESTIMATE = Estimate(
    n_rows=40, n_shards=4, sizes=Sizes(per_row=100.0, per_shard=10.0, once=7), bytes_per_vision_token=1.0, seconds=1.0,
    free_bytes=4047,
)  # fmt: skip


def settings(**chosen) -> JobSettings:
    return JobSettings(**{"teacher": "t", "data": "d", "cache": "c", "gpus_per_worker": 0, **chosen})


def test_bytes_of_some_shards_and_of_all():
    assert ESTIMATE.bytes_of(1) == 10 * 100 + 10
    assert ESTIMATE.n_bytes == 40 * 100 + 4 * 10 + 7


def test_a_disk_that_is_just_large_enough_is_large_enough():
    ESTIMATE.check_space("c")
    with pytest.raises(JobFailedError, match="needs about 4.05 kB and 4.05 kB are free"):
        Estimate(**{**ESTIMATE.__dict__, "free_bytes": 4046}).check_space("c")


def test_a_job_that_did_everything_ends_well_although_it_was_interrupted():
    _check_outcome(settings(), Outcome(n_done=4, interrupted=True), 4, ESTIMATE)


def test_an_interrupted_job_says_how_to_go_on(capfd):
    with pytest.raises(KeyboardInterrupt):
        _check_outcome(settings(), Outcome(n_done=2, left=[2, 3], interrupted=True), 4, ESTIMATE)
    assert capfd.readouterr().err == "2 of 4 shards were committed; run the same command again to compute the other 2\n"


def test_failed_shards_are_told_with_the_first_and_what_is_missing():
    outcome = Outcome(n_done=1, left=[4])
    outcome.fail(3, JobFailedError("later"))
    outcome.fail(1, JobFailedError("broken"))
    outcome.fail(2, JobFailedError("also later"))
    with pytest.raises(
        JobFailedError,
        match=r"3 of 5 shards failed, 1 were committed; 1 were not started. Shard 1: broken. .* about 4.04 kB; run the same",
    ):
        _check_outcome(settings(), outcome, 5, ESTIMATE)


def test_exactly_the_share_of_skipped_rows_is_accepted(teacher_path, tmp_path):
    rows = tiny.rows()
    rows[1]["images"] = [b"broken", tiny.png(3)]
    data = tiny.write_data(tmp_path / "rows.parquet", [*rows, *rows[2:]])
    cache = Cache.open(tiny.make_cache(teacher_path, data, tmp_path / "cache"))
    _check_skipped(settings(max_skipped=0.1), cache.manifest, cache.rows)
    with pytest.raises(
        JobFailedError, match=r"1 of 10 rows were skipped \(1 image-broken\), more than --max-skipped 0.09"
    ):
        _check_skipped(settings(max_skipped=0.09), cache.manifest, cache.rows)


def test_a_worker_that_finds_other_data_by_that_name(teacher_path, data_path, tmp_path):
    data = shutil.copy(data_path, tmp_path / "rows.parquet")
    chosen = settings(teacher=str(teacher_path), data=str(data), cache=str(tmp_path / "cache"))
    manifest, _ = job_manifest(chosen, Dataset(chosen.data))
    tiny.write_data(tmp_path / "rows.parquet", tiny.rows()[:5])
    with pytest.raises(DataMismatchError, match="the files on this machine differ from the driver's"):
        CaptureWorker(chosen, manifest).capture_shard(0)
    assert not (tmp_path / "cache").exists()
