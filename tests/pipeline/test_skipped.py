"""Rows that cannot be used, against --max-skipped: told before the job, counted during it. No Ray here."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from emkd.errors import JobFailedError
from emkd.pipeline import JobSettings
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.preflight import preflight
from emkd.pipeline.skipped import Checked, Forecast, SkipLimit, Skipped, SkippedRow, at_least
from emkd.pipeline.worker import CaptureWorker
from emkd.samples import Dataset
from emkd.storage.manifest.plan import DatasetIdentity, Extension
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.open import open_files
from tests import tiny
from tests.storage.builders import make_manifest


def bad(*rows: int, reason: str = "image-broken") -> list[SkippedRow]:
    return [SkippedRow(row=row, id=f"id{row}", reason=reason, detail="cut short") for row in rows]


def forecast(n_rows, tried, skipped, max_skipped=0.01, **chosen) -> Forecast:
    return Forecast(
        n_rows=n_rows,
        n_left=n_rows,
        max_skipped=max_skipped,
        checked=[Checked(n_rows=tried, skipped=skipped)],
        **chosen,
    )


def test_reasons_are_counted_and_the_first_row_is_kept():
    found = Skipped.of([*bad(9, 4), *bad(7, reason="no-answer")])
    found.add(Skipped.of(bad(2, reason="no-answer")))
    assert (found.n, found.first.row) == (4, 2)
    assert found.described() == "2 image-broken, 2 no-answer"
    assert Skipped().first is None


@pytest.mark.parametrize(
    ("share", "n", "passed"), [(0.1, 4, None), (0.1, 5, 0), (0.0, 0, None), (0.0, 1, 0), (1.0, 41, None)]
)
def test_a_limit_is_passed_when_nothing_can_change_it(share, n, passed):
    limit = SkipLimit.of(share, make_manifest(n_rows=41, rows_per_shard=7))
    limit.add(0, Skipped.of(bad(*range(n))))
    assert limit.passed == passed
    if passed is None:
        limit.check()
    else:
        with pytest.raises(
            JobFailedError, match=rf"{n} of 41 rows were skipped \({n} image-broken\), more than.*row 0 \(id 'id0'\)"
        ):
            limit.check()


def test_each_dataset_has_its_own_share():
    manifest = make_manifest(n_rows=41, rows_per_shard=7)
    extension = Extension(
        number=1, parent_sha256=manifest.plan_sha256, dataset=DatasetIdentity(fingerprint="e", n_rows=5, files=()),
        n_rows=5, kept=((0, 6),), first_shard=6, rows_per_shard=3, rows=((0, 5),),
    )  # fmt: skip
    limit = SkipLimit.of(0.5, manifest.model_copy(update={"extensions": (extension,)}))
    assert limit.n_rows == {0: 41, 1: 5}
    limit.add(1, Skipped.of(bad(0, 1)))
    limit.add(0, Skipped.of(bad(0, 1, 2)))
    assert limit.passed is None
    limit.add(1, Skipped.of(bad(2)))
    assert limit.passed == 1


def test_probability_against_counting():
    draw, n, share = random.Random(0), 20, 0.1
    seen = Counter(sum(draw.random() < share for _ in range(n)) for _ in range(20_000))
    for k in range(6):
        assert at_least(k, n, share) == pytest.approx(sum(seen[i] for i in range(k, n + 1)) / 20_000, abs=0.01)
    assert (at_least(0, 5, 0.0), at_least(1, 5, 0.0), at_least(5, 5, 1.0)) == (1.0, 0.0, 1.0)


def test_all_rows_checked_is_no_guess():
    found = forecast(53, 53, bad(3, 14, 25, 36, 47))
    assert found.certain
    with pytest.raises(
        JobFailedError,
        match=r"^5 of 53 rows \(9.4 %: 5 image-broken\) cannot be used; the first is row 3 \(id 'id3'\): cut short. "
        r"--max-skipped 0.01 allows 0, so the job would fail",
    ):
        found.check()
    forecast(53, 53, bad(3), max_skipped=0.02).check()


def test_a_few_rows_are_extrapolated():
    found = forecast(1_000_000, 128, [*bad(7, 9, 11), *bad(1, reason="too-long")])
    assert found.expected == pytest.approx(31_250)
    assert found.describe().startswith(
        "about 31,250 of 1,000,000 rows (3.1 %: about 23,438 image-broken, 7,812 too-long), by 4 of the 128 rows checked"
    )
    assert not found.fails, "4 of 128 happen once in 25 times at 1 %"
    assert forecast(1_000_000, 128, bad(*range(8))).fails
    assert forecast(1_000_000, 128, []).describe() is None


def test_a_job_that_is_allowed_is_rarely_stopped():
    """At a share that is just allowed, once in a thousand times or less; at ten times the share, nearly always."""
    draw = random.Random(1)
    refused = {share: 0 for share in (0.01, 0.1)}
    for share in refused:
        for _ in range(2000):
            n = sum(draw.random() < share for _ in range(128))
            refused[share] += forecast(1_000_000, 128, bad(*range(n))).fails
    assert refused[0.01] <= 8
    assert refused[0.1] > 1800


def test_what_is_skipped_already_counts():
    assert not forecast(1000, 32, bad(1), max_skipped=0.01, known=9).certain
    assert forecast(1000, 32, bad(1), max_skipped=0.01, known=10).certain
    assert forecast(1000, 32, [], max_skipped=0.01, known=11).certain


class Here:
    """A worker that is called in this process, as `preflight` calls an actor."""

    def __init__(self, worker) -> None:
        self.preflight = SimpleNamespace(remote=worker.preflight)


@pytest.fixture
def seen(teacher_path, tmp_path, monkeypatch):
    """What the preflight says of 53 rows of which 5 cannot be used; the teacher sees 32 of the rows."""
    rows = [{**tiny.rows()[0], "id": f"r{n}"} for n in range(53)]
    for n in (1, 11, 21, 31, 41):
        rows[n] = {**rows[n], "images": [b"broken"]}
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    settings = JobSettings(
        teacher=str(teacher_path), data=str(data), cache=str(tmp_path / "c"), gpus_per_worker=0, logit_error="none",
        rows_per_shard=4,
    )  # fmt: skip
    manifest, _ = job_manifest(settings, Dataset(str(data)))
    monkeypatch.setattr("emkd.pipeline.preflight.result_of", lambda result: result)
    worker = Here(CaptureWorker(settings, manifest))
    return lambda **chosen: preflight(worker, replace(settings, **chosen), manifest, manifest.shards)


def test_the_preflight_reads_more_rows_than_the_teacher_sees(seen):
    estimate = seen()
    assert estimate.forecast.found.reasons == {"image-broken": 5}
    assert estimate.as_dict()["skipped"] == {
        "rows_checked": 53, "unusable": 5, "reasons": {"image-broken": 5}, "expected": 5, "share": 5 / 53,
    }  # fmt: skip
    assert "5 of 53 rows (9.4 %: 5 image-broken) cannot be used; the first is row 1 (id 'r1')" in estimate.describe()
    with pytest.raises(JobFailedError, match="--max-skipped 0.01 allows 0, so the job would fail"):
        estimate.check_skipped()
    seen(max_skipped=0.1).check_skipped()


def test_a_report_has_the_reasons_of_its_shard(teacher_path, tmp_path):
    rows = tiny.rows()
    rows[1]["images"] = [b"broken", tiny.png(3)]
    rows[3]["messages"] = []
    cache = tiny.make_cache(teacher_path, tiny.write_data(tmp_path / "rows.parquet", rows), tmp_path / "c")
    (cache / "index" / "000000.parquet").unlink()
    (cache / "seal.json").unlink()
    settings = JobSettings(
        teacher=str(teacher_path), data=str(tmp_path / "rows.parquet"), cache=str(cache), gpus_per_worker=0
    )
    report = CaptureWorker(settings, read_manifest(open_files(cache))).capture_shard(0)
    assert (report.n_samples, report.n_skipped) == (2, 2)
    assert report.skipped.reasons == {"image-broken": 1, "no-messages": 1}
    assert report.skipped.first.row == 1
