"""A cache that a job is writing, or stopped writing: the report describes what is committed now."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from rich.console import Console

from emkd.cli import main
from emkd.inspection import inspect_cache, render
from emkd.storage.cache import create_cache
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.extend import extend_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import TOKENIZER_JSON, make_cache, make_manifest, make_rows


def shown(report):
    console = Console(file=io.StringIO(), width=200)
    render(report, console)
    return " ".join(console.file.getvalue().split())


def write(files, manifest, shard):
    assert commit_shard(files, write_shard(files, shard, "a", make_rows(manifest, shard), manifest))


def test_a_cache_of_which_nothing_is_committed(tmp_path, capsys):
    manifest = make_manifest()
    files = create_cache(tmp_path / "c", manifest, TOKENIZER_JSON)
    for verify_bytes in (False, True):
        report = inspect_cache(tmp_path / "c", verify_bytes=verify_bytes)
        assert (report["sealed"], report["samples"], report["skipped"], report["skipped_examples"]) == (
            False,
            0,
            {},
            {},
        )
        assert report["shards"] == {"committed": 0, "planned": 3}
        assert report["rows"] == {"committed": 0, "planned": 5}
        assert (report["bytes"]["total"], report["retained_mass"], report["dense_ratio"]) == (0, None, None)
        assert "NOT SEALED" in shown(report)
        assert "0 of 3 shards are committed, with 0 of 5 rows" in shown(report)
    (tmp_path / "c" / "tokenizer.json").unlink()  # the moment between the first two files
    assert inspect_cache(tmp_path / "c")["samples"] == 0
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(files.root), "--json"])
    capsys.readouterr()


def test_how_far_the_job_is_and_how_it_goes_on(tmp_path):
    """Rows 0 to 6 in shards of two; row 3 was skipped, shard 2 is missing."""
    make_cache(tmp_path / "c", make_manifest(n_rows=7), shards=[0, 1, 3], sealed=False)
    report = inspect_cache(tmp_path / "c")
    assert report["shards"] == {"committed": 3, "planned": 4}
    assert report["rows"] == {"committed": 5, "planned": 7}
    assert (report["samples"], report["skipped"]) == (4, {"no_answer": 1})
    text = shown(report)
    assert "3 of 4 shards are committed, with 5 of 7 rows" in text
    assert "run the same cache-teacher command to continue" in text


def test_a_sealed_cache_says_nothing_of_progress(tmp_path):
    make_cache(tmp_path / "c")
    text = shown(inspect_cache(tmp_path / "c"))
    assert "progress" not in text
    assert "to continue" not in text


def test_the_moment_of_sealing(tmp_path, monkeypatch):
    """The seal comes after it was looked for: all shards, no seal, no error."""
    files = make_cache(tmp_path / "c", sealed=False)
    from emkd.storage.lifecycle.seal import read_seal

    def sealed_behind_it(files, *rest):
        found = read_seal(files, *rest)
        if found is None:
            seal(files)
        return found

    monkeypatch.setattr("emkd.storage.cache.read_seal", sealed_behind_it)
    report = inspect_cache(tmp_path / "c")
    assert files.exists("seal.json")
    assert (report["sealed"], report["shards"]) == (False, {"committed": 3, "planned": 3})
    assert "all 3 shards are committed, only the seal is missing" in shown(report)
    assert inspect_cache(tmp_path / "c")["sealed"]


def test_shards_committed_after_verification_are_not_called_verified(tmp_path, monkeypatch):
    from emkd.inspection.damage import verify

    manifest = make_manifest()
    files = make_cache(tmp_path / "c", manifest, shards=[0], sealed=False)

    def then_goes_on(uri, **options):
        found = verify(uri, **options)
        write(files, manifest, 1)
        return found

    monkeypatch.setattr("emkd.inspection.damage.verify", then_goes_on)
    assert inspect_cache(tmp_path / "c", verify_bytes=True)["shards"]["committed"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("verify_bytes", [False, True])
def test_it_can_be_watched(tmp_path, verify_bytes):
    """A thread writes, commits and seals, each step while an inspection runs."""
    manifest = make_manifest(n_rows=13)
    path, turn = tmp_path / "c", threading.Semaphore(0)
    files = create_cache(path, manifest, TOKENIZER_JSON)
    steps = [*(lambda n=n: write(files, manifest, n) for n in range(manifest.plan.n_shards)), lambda: seal(files)]

    def job():
        for step in steps:
            assert turn.acquire(timeout=60)
            step()

    reports = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job)
        while not running.done():
            turn.release()
            reports.append(inspect_cache(path, verify_bytes=verify_bytes))
        running.result()
    reports.append(inspect_cache(path))
    assert (reports[-1]["sealed"], reports[-1]["samples"], reports[-1]["skipped"]) == (True, 12, {"no_answer": 1})
    for before, after in pairwise(reports):
        assert before["rows"]["committed"] <= after["rows"]["committed"] <= 13
    assert len({report["shards"]["committed"] for report in reports}) > 2
    for report in reports:
        n = report["shards"]["committed"]
        assert report["rows"]["committed"] == sum(len(manifest.plan.rows(shard)) for shard in range(n))
        assert report["samples"] + sum(report["skipped"].values()) == report["rows"]["committed"]
        assert report["bytes"]["total"] == sum(v for k, v in report["bytes"].items() if k != "total")
        shown(report)


def test_an_extended_cache(tmp_path):
    """Rows 0 to 3 at first, then 0 to 6: three more in two shards, not made yet."""
    files = make_cache(tmp_path / "c", make_manifest(n_rows=4), skip=())
    extend_cache(files, make_manifest(n_rows=7), TOKENIZER_JSON, lambda: [])
    report = inspect_cache(tmp_path / "c")
    assert (report["sealed"], report["shards"]) == (False, {"committed": 2, "planned": 4})
    assert report["rows"] == {"committed": 4, "planned": 7}
    (extension,) = report["extensions"]
    assert (extension["files"], extension["rows"], extension["added_rows"]) == (["train.parquet"], 7, 3)
    assert report["dataset"]["rows"] == 4
    assert "extension 1 train.parquet: 3 of 7 rows added" in shown(report)
