"""The whole job on a disk that fills up in the middle: a small tmpfs, mounted in a namespace of the test's own."""

import json
import subprocess
import sys

import pytest

from tests import tiny

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = """
set -u
mount -t tmpfs -o size=3m tmpfs "$1/disk"
job() { "$2" -m emkd.cli cache-teacher --teacher "$3" --data "$4" --cache "$1/disk/cache" --gpus-per-worker 0 \
    --rows-per-shard 1 --top-k 8 --answer-top-k 8; echo "exit $?" >&2; }
job "$@" 2> "$1/first"
"$2" -m emkd.cli inspect "$1/disk/cache" --verify --json > "$1/between"
mount -o remount,size=30m "$1/disk"
job "$@" 2> "$1/second"
"$2" -m emkd.cli inspect "$1/disk/cache" --verify --json > "$1/after"
"""


def can_mount() -> bool:
    try:
        probe = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="no tmpfs can be mounted here (needs user namespaces)")
def test_a_disk_that_fills_up_in_the_middle(teacher_path, tmp_path):
    rows = []
    for number in range(60):
        row = tiny.rows()[number % 6]
        rows.append({**row, "images": [tiny.png(100 * number + n) for n in range(len(row["images"]))]})
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    (tmp_path / "disk").mkdir()
    arguments = [str(tmp_path), sys.executable, str(teacher_path), str(data)]
    subprocess.run(["unshare", "-Urm", "bash", "-c", SCRIPT, "bash", *arguments], check=True)

    first = (tmp_path / "first").read_text()
    assert first.endswith("exit 1\n"), first
    assert "cannot be written (No space left on device): it needs" in first
    assert "were not started" in first, "a full disk stops the job: every other shard would fail as well"
    assert "The missing shards need about" in first
    assert "Traceback" not in first
    between = json.loads((tmp_path / "between").read_text())
    assert (between["sealed"], between["damaged"]) == (False, [])
    assert 0 < between["shards"]["committed"] < 60

    second = (tmp_path / "second").read_text()
    assert second.endswith("exit 0\n"), second
    assert f"{60 - between['shards']['committed']} of 60 shards to compute" in second
    after = json.loads((tmp_path / "after").read_text())
    assert (after["sealed"], after["damaged"], after["samples"]) == (True, [], 60)
