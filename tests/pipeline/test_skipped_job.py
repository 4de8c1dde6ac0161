"""Whole jobs whose data have rows that cannot be used: known before the job, which stops early, and resumes."""

import json

import pytest

from emkd.cli import main
from emkd.errors import JobFailedError
from emkd.pipeline import JobSettings, cache_teacher
from emkd.pipeline.preflight import READ_ROWS
from emkd.storage.cache import Cache
from emkd.storage.objects.names import committed_shards
from emkd.storage.objects.open import open_files
from tests import tiny

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def settings(teacher, data, cache, **chosen) -> JobSettings:
    return JobSettings(
        teacher=str(teacher), data=str(data), cache=str(cache), gpus_per_worker=0, logit_error="none", top_k=5,
        answer_top_k=5, **chosen,
    )  # fmt: skip


def committed(cache) -> list[int]:
    return sorted(committed_shards(open_files(cache)))


def test_a_dry_run_fails_as_the_job_would(teacher_path, tmp_path, capsys, monkeypatch):
    """5 of 53 rows, and one in a hundred may be skipped."""
    rows = [{**tiny.rows()[0], "id": f"r{n}"} for n in range(53)]
    for n in (4, 14, 24, 34, 44):
        rows[n] = {**rows[n], "images": [b"broken"]}
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    words = f"--teacher {teacher_path} --data {data} --cache {tmp_path / 'c'} --gpus-per-worker 0 --logit-error none"

    def call(*more: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["emkd", "cache-teacher", *words.split(), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    code, out, err = call("--dry-run")
    assert code == 1
    assert "5 of 53 rows (9.4 %: 5 image-broken) cannot be used; the first is row 4 (id 'r4')" in out
    assert "--max-skipped 0.01 allows 0, so the job would fail" in err
    code, out, _ = call("--dry-run", "--max-skipped", "0.1", "--json")
    assert (code or 0, json.loads(out)["skipped"]["expected"]) == (0, 5)
    code, _, err = call()
    assert (code, "so the job would fail" in err) == (1, True)
    assert not (tmp_path / "c").exists()


def test_a_job_stops_as_soon_as_it_must_fail_and_goes_on(teacher_path, tmp_path, capfd):
    """400 rows, of which 4 may be skipped; 5 in the first shard, none of which the preflight reads."""
    rows = [{**tiny.rows()[2], "id": f"r{n}"} for n in range(400)]
    tried = {400 * n // READ_ROWS for n in range(READ_ROWS)}
    for n in [n for n in range(20) if n not in tried][:5]:
        rows[n] = {**rows[n], "messages": []}
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    asked = settings(teacher_path, data, tmp_path / "c", rows_per_shard=20)
    with pytest.raises(
        JobFailedError,
        match=r"5 of 400 rows were skipped \(5 no-messages\), more than --max-skipped 0.01; the first is row 1 .*then "
        r"nothing is computed again. The job has stopped: 1 of 20 shards were committed, and the other 19 cannot",
    ):
        cache_teacher(asked)
    assert committed(tmp_path / "c") == [0]
    capfd.readouterr()
    with pytest.raises(JobFailedError, match="5 of 400 rows were skipped"):
        cache_teacher(asked)
    assert "shards to compute" not in capfd.readouterr().err, "before anything is started"
    first = (tmp_path / "c" / "index" / "000000.parquet").read_bytes()
    cache = cache_teacher(settings(teacher_path, data, tmp_path / "c", rows_per_shard=20, max_skipped=0.0125))
    assert (cache.sealed, cache.n_samples) == (True, 395)
    assert "19 of 20 shards to compute" in capfd.readouterr().err
    assert (tmp_path / "c" / "index" / "000000.parquet").read_bytes() == first


def test_mended_images_are_read_again(teacher_path, tmp_path, capfd):
    """A cache that may not be sealed, because an image of its JSON data was missing: only that image's shard is made
    again."""
    data = tiny.write_llava(tmp_path / "data", tiny.rows())
    missing = tmp_path / "data" / "images" / "5-0.png"
    content = missing.read_bytes()
    missing.unlink()
    asked = settings(
        teacher_path, data, tmp_path / "c", image_root=tmp_path / "data", rows_per_shard=2, max_skipped=1.0
    )
    cache_teacher(asked)
    for name in ("seal.json", "index.parquet", "index/000001.parquet"):
        (tmp_path / "c" / name).unlink()
    strict = settings(teacher_path, data, tmp_path / "c", image_root=tmp_path / "data", rows_per_shard=2)
    with pytest.raises(JobFailedError, match="1 of 6 rows were skipped .* row 5 .*no file 'images/5-0.png'"):
        cache_teacher(strict)
    assert committed(tmp_path / "c") == [0, 2]
    missing.write_bytes(content)
    before = (tmp_path / "c" / "index" / "000000.parquet").read_bytes()
    capfd.readouterr()
    cache = cache_teacher(strict)
    assert (cache.sealed, cache.n_samples) == (True, 6)
    assert (
        "1 rows that were skipped have changed since, so that 1 shards are computed again (2)" in capfd.readouterr().err
    )
    assert (tmp_path / "c" / "index" / "000000.parquet").read_bytes() == before
    assert Cache.open(tmp_path / "c").skipped.num_rows == 0
