"""What `emkd inspect` says, against counts made from the rows and files themselves."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from emkd.cli import main
from emkd.errors import SampleNotFoundError, UsageError
from emkd.inspection import inspect_cache, render
from emkd.storage.cache import Cache
from tests import tiny
from tests.inspection.made import write_cache
from tests.storage.builders import make_manifest, make_rows


@pytest.fixture(scope="module")
def cut_cache(teacher_path, data_path, tmp_path_factory):
    return tiny.make_cache(
        teacher_path, data_path, tmp_path_factory.mktemp("cut") / "cache", top_k=8, answer_top_k=8, precision="bfloat16", affinity_precision="int8"
    )  # fmt: skip


def test_the_summary_counts_what_is_there(cut_cache):
    report = inspect_cache(cut_cache)
    n_images = sum(len(row["images"]) for row in tiny.rows())
    assert report["sealed"]
    assert (report["samples"], report["skipped"], report["vocabulary"]) == (6, {}, 26)
    assert report["shards"] == {"committed": 2, "planned": 2}
    assert report["tokens"]["vision"] == 16 * n_images
    assert report["tokens"]["answer"] == 27
    assert report["teacher"]["architecture"] == "llava"
    assert report["dataset"]["files"] == ["rows.parquet"]
    on_disk = sum(p.stat().st_size for p in (cut_cache / "shards").rglob("*") if p.is_file())
    assert report["bytes"]["total"] == on_disk == sum(v for k, v in report["bytes"].items() if k != "total")
    assert report["bytes_per_vision_token"]["total"] == pytest.approx(on_disk / (16 * n_images))
    dense = (16 * n_images + 27) * 26 * 2
    stored = sum(v for k, v in report["bytes"].items() if k.startswith(("vision", "answer")))
    assert report["dense_ratio"] == pytest.approx(dense / stored)


def test_retained_mass_is_that_of_the_stored_logits(cut_cache, cache_path):
    """Against softmax over all V, from a cache where nothing is cut."""
    whole = Cache.open(cache_path)
    masses = []
    for number in range(6):
        logits = torch.from_numpy(whole.record(number).vision.logits).double()
        if len(logits):
            masses.append(float(logits.softmax(1)[:, :8].sum(1).mean()))
    found = inspect_cache(cut_cache)["retained_mass"]
    for percentile in (1, 10, 50, 90, 99):
        assert found[f"p{percentile}"] == pytest.approx(np.percentile(masses, percentile), rel=2e-3)
    assert inspect_cache(cache_path)["retained_mass"]["p1"] == pytest.approx(1.0)


def test_a_sample_with_its_words_as_a_grid(cut_cache):
    cache = Cache.open(cut_cache)
    report = inspect_cache(cut_cache, sample=cache.sample_keys[1][:8])
    assert report["text"] == "user: ⟦image 0⟧ and ⟦image 1⟧ what is that assistant: big dog <end>"
    assert [answer["said"] for answer in report["answers"]] == ["big", "dog", "<end>"]
    record = cache.record(1)
    for number, image in enumerate(report["images"]):
        (tile,) = image["words"]
        assert np.array(tile).shape == (4, 4)
        words = [tiny.VOCABULARY[token] for token in record.vision.ids[16 * number : 16 * number + 16, 0]]
        assert [word for row in tile for word in row] == words
    assert inspect_cache(cut_cache, sample="last")["id"] == "last"
    with pytest.raises(UsageError, match="2 samples have the id 'one'; name one by its key"):
        inspect_cache(cut_cache, sample="one")
    with pytest.raises(SampleNotFoundError, match="no sample has the key or id 'nobody'"):
        inspect_cache(cut_cache, sample="nobody")


@pytest.fixture
def skipping_cache(tmp_path):
    """Seven rows, of which 1, 2, 4 and 6 were skipped for two reasons, with details of all kinds."""
    manifest = make_manifest(n_rows=7)
    details = {1: ("image-broken", "cut [short]\nat byte 7\x1b[31m"), 4: ("image-broken", "gone"),
               2: ("too-long", "x" * 400), 6: ("image-broken", "gone")}  # fmt: skip
    rows = [make_rows(manifest, shard, skip=tuple(details)) for shard in range(4)]
    rows = [
        [replace(row, reason=details[row.hint.row][0], detail=details[row.hint.row][1]) if not row.record else row for row in shard]
        for shard in rows
    ]  # fmt: skip
    write_cache(tmp_path / "cache", manifest, rows)
    return tmp_path / "cache", [row for shard in rows for row in shard]


def test_skipped_rows_by_reason_with_an_example(skipping_cache, capsys):
    path, rows = skipping_cache
    report = inspect_cache(path)
    assert report["skipped"] == {"image-broken": 3, "too-long": 1}
    assert list(report["skipped"]) == ["image-broken", "too-long"]  # most of them first
    examples = {}
    for row in rows:
        if row.record is None and row.reason not in examples:
            examples[row.reason] = {"row": row.hint.row, "id": row.hint.id, "key": row.key, "detail": row.detail}
    assert report["skipped_examples"] == examples
    assert report["rows"] == {"committed": 7, "planned": 7}
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert "samples        3; skipped: 3 image-broken, 1 too-long" in [line.rstrip() for line in lines]
    assert "image-broken     3  row 1, id id-1: cut [short] at byte 7·[31m" in [line.rstrip() for line in lines]
    start = next(i for i, line in enumerate(lines) if line.startswith("too-long"))
    shown = "".join(line.removeprefix("too-long         1").strip() for line in lines[start:])
    assert shown == "row 2, id id-2:" + "x" * 300 + "..."  # the whole of it is in the report


def test_nothing_was_skipped(cut_cache):
    report = inspect_cache(cut_cache)
    assert (report["skipped"], report["skipped_examples"]) == ({}, {})
    console = Console(file=io.StringIO(), width=80)
    render(report, console)
    assert "skipped" not in console.file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_the_summary_fits_the_terminal_and_nothing_is_lost(skipping_cache, width):
    path, _ = skipping_cache
    report = inspect_cache(path)
    report["uri"] = "/a" * 150
    report["dataset"]["files"] = [f"part-{n}.parquet" for n in range(1200)]
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    render(report, console)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    joined = "".join(line[15:].strip() for line in lines)
    assert "/a" * 150 in joined
    assert "part-2.parquet and 1,197 more: 7 of 7 rows" in " ".join(console.file.getvalue().split())


def test_an_unsealed_cache_is_described_as_such(cut_cache, tmp_path, capsys):
    shutil.copytree(cut_cache, tmp_path / "cache")
    (tmp_path / "cache" / "seal.json").unlink()
    (tmp_path / "cache" / "index" / "000001.parquet").unlink()
    report = inspect_cache(tmp_path / "cache")
    assert (report["sealed"], report["samples"], report["shards"]) == (False, 4, {"committed": 1, "planned": 2})
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "cache")])
    assert "NOT SEALED" in capsys.readouterr().out


def test_the_terminal_shows_the_same_numbers(cut_cache, capsys):
    for arguments in ([], ["--sample", "last"]):
        with pytest.raises(SystemExit):
            main(["inspect", str(cut_cache), *arguments, "--json"])
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1
        report = json.loads(out)
        with pytest.raises(SystemExit):
            main(["inspect", str(cut_cache), *arguments])
        shown = capsys.readouterr().out
        if arguments:
            assert report["key"] in shown
            assert all(word[:9] in shown for row in report["images"][0]["words"][0] for word in row)
        else:
            assert f"{report['bytes']['total']:,}" in shown
            assert f"p50 {report['retained_mass']['p50']:.4f}" in shown


def test_no_torch_no_ray_and_no_waiting(cut_cache):
    """What takes seconds to import is not imported; the time itself is measured in benchmarks/storage/inspect_time.py."""
    code = (
        "import sys\nfrom emkd.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'ray', 'transformers', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(cut_cache), "--sample", "last"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    assert out.splitlines()[-1] == "[]"
