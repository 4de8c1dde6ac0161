"""Data are on the disk before any hash names them: a disk that forgets what was not synced (see `power`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


def model(folder, *without):
    folder.mkdir()
    command = [sys.executable, "-W", "error", "-m", "tests.storage.lifecycle.power", str(folder), *without]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert (run.returncode, run.stderr) == (0, "")
    return json.loads(run.stdout)


def test_whatever_is_named_is_safe(many_caches):
    """Two jobs, each also after a kill at each of its operations outside of the shards' folders: 110 runs, 864 links."""
    found = model(many_caches / "whole")
    assert found["unsafe"] == []
    assert found["links"] > 800
    assert min(found["deaths"].values()) >= 50


@pytest.mark.parametrize(
    ("without", "unsafe"),
    [
        (
            "sync_tree",
            ["index/000000.parquet: the bytes of zarr.json", "index/000002.parquet: the name extend/shards/"],
        ),
        (
            "_sync_names",
            ["manifest.json: the name fresh-2", "extensions/000001/plan.json: the name extend-4/extensions/0"],
        ),
    ],
)
def test_the_model_sees_a_sync_that_is_missing(many_caches, without, unsafe):
    found = model(many_caches / without, without)["unsafe"]
    for expected in unsafe:
        assert any(line.startswith(expected) for line in found)
