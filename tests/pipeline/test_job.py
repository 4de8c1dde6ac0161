"""The Ray job, for real: one worker on the CPU."""

import json
import shutil
from dataclasses import replace

import pytest

from emkd.cli import main
from emkd.errors import (
    CacheConflictError,
    CacheIncompleteError,
    DataMismatchError,
    JobFailedError,
    ModelError,
    UsageError,
)
from emkd.pipeline import JobSettings, cache_teacher, estimate_job
from emkd.pipeline.job_manifest import job_manifest
from emkd.samples import Dataset
from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import read_index
from tests import tiny

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def settings(teacher_path, data_path, cache, **chosen) -> JobSettings:
    given = {"gpus_per_worker": 0, "rows_per_shard": 4, "top_k": 8, "answer_top_k": 8, "logit_error": "none"}
    return JobSettings(teacher=str(teacher_path), data=str(data_path), cache=str(cache), **{**given, **chosen})


def objects(cache: Cache) -> list[dict]:
    """Size and hash of every object of every shard, without the attempts' names."""
    return [dict(read_index(cache.files, shard).objects) for shard in cache.shards]


def test_the_job_writes_what_the_worker_alone_writes(teacher_path, data_path, tmp_path, capfd):
    """With codes: their basis is made from the preflight's rows, here all of them."""
    chosen = settings(teacher_path, data_path, tmp_path / "cache", logit_error=0.4)
    cache = cache_teacher(chosen)
    assert cache.sealed
    assert cache.n_samples == 6
    alone = tiny.make_cache(
        teacher_path, data_path, tmp_path / "alone", top_k=8, answer_top_k=8, precision="bfloat16",
        affinity_precision="int8", logit_error=0.4,
    )  # fmt: skip
    assert cache.manifest.basis == Cache.open(alone).manifest.basis
    assert objects(cache) == objects(Cache.open(alone))
    assert verify(tmp_path / "cache") == []
    err = capfd.readouterr().err
    assert "2 of 2 shards to compute" in err
    assert "bytes per vision token" in err
    assert "codes with a predicted logit error of 0.4 (as asked)" in err

    again = cache_teacher(chosen)  # nothing is missing: no Ray, no teacher
    assert again.seal == cache.seal
    assert "to do" not in capfd.readouterr().err

    with pytest.raises(CacheConflictError, match=r"top_k: cache has 8, this run 4"):
        cache_teacher(replace(chosen, top_k=4))
    with pytest.raises(CacheConflictError, match=r"codes.logit_error: cache has 0.4, this run 0.2"):
        cache_teacher(replace(chosen, logit_error=0.2))
    with pytest.raises(CacheConflictError, match=r"teacher.weights_sha256"):
        cache_teacher(replace(chosen, teacher=str(tiny.save_model(tmp_path / "other", seed=9, hidden=32))))


def test_a_stopped_job_goes_on(teacher_path, data_path, tmp_path, capfd):
    """A shard is committed already, another one is half written; both as the first run left them."""
    whole = cache_teacher(settings(teacher_path, data_path, tmp_path / "whole"))
    cache_teacher(settings(teacher_path, data_path, tmp_path / "cache"))
    folder = tmp_path / "cache"
    (folder / "seal.json").unlink()
    (folder / "index.parquet").unlink()
    (folder / "index" / "000001.parquet").unlink()
    capfd.readouterr()
    cache = cache_teacher(settings(teacher_path, data_path, folder), clean=True)
    err = capfd.readouterr().err
    assert "1 of 2 shards to compute" in err
    assert "removed shards/000001-" in err
    assert objects(cache) == objects(whole)
    assert len(list((folder / "shards").iterdir())) == 2


def test_too_many_skipped_rows_fail_and_cost_nothing_to_accept(teacher_path, tmp_path, capfd):
    rows = tiny.rows()
    rows[1]["images"] = [b"broken", tiny.png(3)]
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    made = cache_teacher(settings(teacher_path, data, tmp_path / "cache", max_skipped=0.5)).files.root
    for name in ("seal.json", "index.parquet"):
        (made / name).unlink()
    with pytest.raises(
        JobFailedError, match=r"1 of 6 rows were skipped \(1 image-broken\), more than --max-skipped 0.01"
    ):
        cache_teacher(settings(teacher_path, data, tmp_path / "cache"))
    assert not (tmp_path / "cache" / "seal.json").exists()
    capfd.readouterr()
    cache = cache_teacher(settings(teacher_path, data, tmp_path / "cache", max_skipped=0.5))
    assert "to do" not in capfd.readouterr().err
    assert (cache.sealed, cache.n_samples) == (True, 5)
    assert cache.skipped.to_pylist()[0]["reason"] == "image-broken"


def test_what_a_worker_raises_arrives_as_it_is(teacher_path, data_path, tmp_path):
    broken = tiny.save_model(tmp_path / "broken", seed=1, hidden=32)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded"):
        estimate_job(settings(broken, data_path, tmp_path / "cache"))
    with pytest.raises(
        UsageError, match=r"1 workers need 1 GPUs and Ray has 0; run on the CPU with --gpus-per-worker 0"
    ):
        estimate_job(settings(teacher_path, data_path, tmp_path / "cache", gpus_per_worker=1))
    estimate = estimate_job(settings(teacher_path, data_path, tmp_path / "cache"))
    assert (estimate.n_rows, estimate.n_bytes > 0) == (6, True)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_is_too_small_is_noticed_before_the_job(teacher_path, data_path, tmp_path, monkeypatch):
    monkeypatch.setattr("emkd.storage.objects.local.LocalFiles.free_bytes", lambda files: 100)
    with pytest.raises(JobFailedError, match=r"the job needs about .* and 100 bytes are free; make room"):
        cache_teacher(settings(teacher_path, data_path, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_job_that_fails_at_its_preflight_leaves_nothing(teacher_path, tmp_path):
    rows = [{**row, "images": [b"broken"] * len(row["images"])} for row in tiny.rows() if row["images"]]
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    with pytest.raises(
        JobFailedError, match="none of the 5 rows checked can be used; the first is row 0: image-broken"
    ):
        cache_teacher(settings(teacher_path, data, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_more_rows_and_damage(teacher_path, data_path, tmp_path, capfd):
    """A second dataset is added; then a shard of each is damaged, and only these two shards are rewritten."""
    folder = tmp_path / "cache"
    cache_teacher(settings(teacher_path, data_path, folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    fresh = [
        {**row, "id": f"new-{row['id']}", "images": [tiny.png(50 + n) for n in range(len(row["images"]))]}
        for row in tiny.rows()
    ]
    more = tiny.write_data(tmp_path / "more.parquet", [tiny.rows()[0], *fresh])
    with pytest.raises(CacheConflictError, match=r"(?s)dataset.fingerprint.*Other rows can be added with --extend"):
        cache_teacher(settings(teacher_path, more, folder))
    with pytest.raises(CacheConflictError, match=r"top_k: cache has 8, this run 4"):
        cache_teacher(settings(teacher_path, more, folder, top_k=4), extend=True)

    sealed = (folder / "seal.json").read_bytes()
    with pytest.raises(UsageError, match="run on the CPU with --gpus-per-worker 0"):
        cache_teacher(settings(teacher_path, more, folder, gpus_per_worker=1), extend=True)
    assert not (folder / "extensions").exists(), "what fails before its first shard does not unseal the cache"
    part = tiny.write_data(tmp_path / "part.parquet", tiny.rows()[1:3])
    assert cache_teacher(settings(teacher_path, part, folder), extend=True).n_samples == 6
    assert "all rows of this data are in the cache" in capfd.readouterr().err
    assert (folder / "seal.json").read_bytes() == sealed

    estimate = estimate_job(settings(teacher_path, more, folder), extend=True)
    assert estimate.n_rows == 5, "the first row, and the one without images, are in the cache"
    assert not (folder / "extensions").exists()
    cache = cache_teacher(settings(teacher_path, more, folder), extend=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was there is untouched"
    assert [cache.sample_info(n).id for n in range(6, 11)] == ["new-one", "new-two", "new-one", "new-None", "new-last"]
    whole = objects(cache)

    victims = [next(folder.glob("shards/000001-*/affinity/c/0")), next(folder.glob("shards/000003-*/zarr.json"))]
    victims[0].write_bytes(b"")
    victims[1].unlink()
    capfd.readouterr()
    with pytest.raises(
        CacheIncompleteError,
        match=r"1 of 4 shards are missing .*of more.parquet\); run cache-teacher again with that data",
    ):
        cache_teacher(settings(teacher_path, data_path, folder), repair=True)
    err = capfd.readouterr().err
    assert "damaged objects: 2; shards to rewrite: 2" in err
    assert "1 of 4 shards to compute" in err
    repaired = cache_teacher(settings(teacher_path, more, folder), repair=True)
    assert objects(repaired) == whole
    assert verify(folder) == []
    kept = {path.parent.name for path in before if path.name == "zarr.json" and path.parent.parent.name == "shards"}
    now = {read_index(cache.files, shard).prefix.removeprefix("shards/") for shard in range(4)}
    assert {name[:6] for name in now & kept} == {"000000"}, "only the damaged ones have new attempts"
    capfd.readouterr()
    cache_teacher(settings(teacher_path, more, folder), repair=True, clean=True)
    assert "nothing is damaged" in capfd.readouterr().err
    assert {path.name[:6] for path in (folder / "shards").iterdir()} == {f"{n:06d}" for n in range(4)}
    assert len(list((folder / "shards").iterdir())) == 4


def test_a_job_whose_last_rows_are_all_bad_goes_on(teacher_path, tmp_path):
    """If none of the checked rows can be used, a new job stops, but not a job that resumes near its end."""
    rows = tiny.rows()
    rows[4]["images"][0] = rows[5]["images"][0] = b"broken"
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    folder = tiny.make_cache(teacher_path, data, tmp_path / "cache", top_k=8, answer_top_k=8, precision="bfloat16", affinity_precision="int8")  # fmt: skip
    for name in ("seal.json", "index.parquet", "index/000001.parquet"):
        (folder / name).unlink()
    cache = cache_teacher(settings(teacher_path, data, folder, max_skipped=0.5))
    assert (cache.sealed, cache.n_samples) == (True, 4)


def test_images_of_another_root_do_not_join(teacher_path, tmp_path):
    """JSON data do not contain their images: another --image-root would mix two sets of images."""
    for name, shift in (("a", 0), ("b", 50)):
        rows = [
            {**row, "images": [tiny.png(100 * n + i + shift) for i in range(len(row["images"]))]}
            for n, row in enumerate(tiny.rows())
        ]
        tiny.write_llava(tmp_path / name, rows)
    data = tmp_path / "a" / "rows.json"
    chosen = settings(teacher_path, data, tmp_path / "cache", image_root=tmp_path / "a")
    cache_teacher(chosen)
    for name in ("seal.json", "index.parquet", "index/000001.parquet"):
        (tmp_path / "cache" / name).unlink()
    with pytest.raises(DataMismatchError, match=r"row 0 is not what was cached: .* or --image-root has other images"):
        cache_teacher(replace(chosen, image_root=tmp_path / "b"))
    assert cache_teacher(chosen).sealed


def test_a_dry_run_writes_nothing(teacher_path, data_path, tmp_path, capfd):
    folder = tmp_path / "cache"
    cache_teacher(settings(teacher_path, data_path, folder))
    (folder / "tokenizer.json").unlink()
    before = sorted(folder.rglob("*"))
    estimate_job(settings(teacher_path, data_path, folder))
    assert sorted(folder.rglob("*")) == before
    assert "nothing is missing in the cache; the estimate is for making it again from scratch" in capfd.readouterr().err


def test_a_dry_run_compares_settings_on_the_users_rows(teacher_path, data_path, tmp_path, capsys, monkeypatch):
    """As the command line does; --json is one object."""
    words = f"cache-teacher --dry-run --teacher {teacher_path} --data {data_path} --cache {tmp_path / 'cache'}"
    monkeypatch.setattr("sys.argv", ["emkd", *words.split(), "--gpus-per-worker", "0", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    names = [setting["name"] for setting in found["compared"]["settings"]]
    assert names == ["top 64 alone", "top 128 alone", "error 1.6", "error 0.8", "error 0.4", "error 0.2"]
    assert found["rows"] == 6
    assert "predicted logit error" in found["codes"]
    assert found["compared"]["advice"].startswith("Take --top-k")
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_format_3_goes_on_without_codes(teacher_path, data_path, tmp_path, capfd):
    """The command that started it, run again by this version: its defaults are those that it had."""
    chosen = settings(teacher_path, data_path, tmp_path / "cache", top_k=None, answer_top_k=64, logit_error=None)
    run, tokenizer = job_manifest(chosen, Dataset(chosen.data), 3)
    create_cache(chosen.cache, run, tokenizer)
    cache = cache_teacher(chosen)
    assert (cache.manifest.format_version, cache.manifest.codes, cache.manifest.top_k) == (3, None, 26)
    assert (cache.sealed, cache.n_samples) == (True, 6)
    with pytest.raises(UsageError, match="format version 3, which has no codes"):
        cache_teacher(replace(chosen, logit_error=0.5))


def test_a_lost_plan_is_written_again(teacher_path, data_path, tmp_path):
    """The solution that the error names: remove the folder of a damaged plan, add the same rows again. No shard is
    rewritten, so neither Ray nor the teacher is needed."""
    chosen = {"top_k": 8, "answer_top_k": 8, "precision": "bfloat16", "affinity_precision": "int8"}
    folder = tiny.make_cache(teacher_path, data_path, tmp_path / "cache", limit=2, **chosen)
    tiny.make_cache(teacher_path, data_path, folder, extend=True, **chosen)
    before = Cache.open(folder)
    shutil.rmtree(folder / "extensions")
    assert [damage.name for damage in verify(folder)] == ["extensions/000001/plan.json"]
    again = cache_teacher(settings(teacher_path, data_path, folder), extend=True)
    assert (again.sealed, again.n_samples) == (True, 6)
    assert again.sample_keys == before.sample_keys
    assert objects(again) == objects(before)
    assert verify(folder) == []
