"""Two concurrent processes on one cache: both succeed, and the cache is the same as after one process (see `race`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("clean", [(), ("clean",)], ids=["", "clean"])
@pytest.mark.parametrize("scenario", ["fresh", "extend"])
def test_two_processes_at_once(many_caches, scenario, clean):
    """5 times: one seal, no damage, the objects of an undisturbed run, no lost attempts.

    With "clean", the process that is done deletes lost attempts while the other process still writes its own.
    """
    folder = many_caches / "-".join([scenario, *clean])
    folder.mkdir()
    command = [sys.executable, "-W", "error", "-m", "tests.storage.lifecycle.race", scenario, str(folder), "5", *clean]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert (run.returncode, run.stderr) == (0, "")
    undisturbed, *races = json.loads(run.stdout)
    assert (undisturbed["codes"], len(races)) == ([0, 0], 5)
    assert [race["codes"] for race in races] == [[0, 0]] * 5
    assert [race["result"] for race in races] == [None] * 5, "as after the undisturbed run"
