"""A process is killed at any operation, and the next run completes the cache: each row once, the same bits.

Three jobs on a small cache (see `killed`) have 599 operations. A process is killed before each of them, at 98 of them
also with half a file written, and for each of them once more the disk is full from there on: 1,296 caches.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
ENDED = {"die": "SIGKILL", "torn": "SIGKILL", "full": "CacheWriteError"}
CASES = [(scenario, kind) for scenario in ("fresh", "extend", "repair") for kind in ("die", "torn", "full")]


@pytest.mark.parametrize(("scenario", "kind"), CASES)
def test_ending_at_every_operation(scenario, kind, many_caches):
    folder = many_caches / f"{scenario}-{kind}"
    folder.mkdir()
    command = [sys.executable, "-W", "error", "-m", "tests.storage.lifecycle.killed", scenario, kind, str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (run.returncode, run.stderr) == (0, "")
    undisturbed, *results = map(json.loads, run.stdout.splitlines())
    check_undisturbed(scenario, undisturbed)
    assert sorted(result["n"] for result in results) == list(range(1, 1 + undisturbed["last"]))
    problems = [f"n = {result['n']}: {result['problem']}" for result in results if result["problem"]]
    assert problems == [], "\n".join(problems[:3])
    assert {result["ended"] for result in results} == {ENDED[kind]}, "a run that failed must not look like a success"


def check_undisturbed(scenario, found):
    """Check the undisturbed run that every other run is compared with: sealed, intact, each row once or skipped."""
    assert (found["sealed"], found["damage"]) == (True, [])
    first = ["0-0", "0-2"], [[0, 1, "no_answer", "empty turn"]]
    added = ["1-2"], [[2, 1, "unreadable", "no such file"]]
    expected = [a + b for a, b in zip(first, added, strict=True)] if scenario == "extend" else list(first)
    assert [sorted(found["records"]), found["skipped"]] == expected
    assert set(found["kinds"]) >= {"write", "sync", "os.mkdir", "os.link", "os.remove"}
    hidden = [name for name in found["names"] if name.rpartition("/")[2].startswith(".")]
    assert hidden == [], "nothing half-written or half-deleted is left"
    folders = [name for name in found["names"] if name.startswith("shards/") and name.count("/") == 1]
    assert folders == sorted({f"shards/{int(shard):06d}" for shard in found["objects"]}), "one attempt at each shard"


def test_the_child_really_is_killed_in_the_middle(many_caches):
    """The tests of this file can fail: a kill leaves a half-written cache, and only a second run completes it."""
    code = (
        "import sys; from tests.storage.lifecycle.killed import *; from tests.storage.lifecycle.operations import *\n"
        "watch(sys.argv[1], die_torn_at(12)); run_fresh(sys.argv[1])"
    )
    folder = many_caches / "cache"
    run = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=False)
    assert run.returncode == -9
    assert (folder / "manifest.json").exists()
    assert not (folder / "index").exists()
    assert [path.stat().st_size for path in folder.glob("shards/*/*/**/*") if path.is_file()]
