"""A disk that is full, a folder that is not writable: nothing committed is lost, and the same run completes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emkd.errors import CacheWriteError, DamagedCacheError
from emkd.storage.cache import Cache, verify
from emkd.storage.objects.local import LocalFiles
from tests.storage.builders import make_cache

ROOT = Path(__file__).parents[3]
MOUNT = 'mount -t tmpfs -o size=1m none "$1" || exit 77; shift; exec "$@"'


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MiB; for 0, 1, 2, ... free pages until the job has enough, from the middle of a shard on."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to mount a small file system with")
    command = [sys.executable, "-W", "error", "-m", "tests.storage.lifecycle.refused", "full", str(tmp_path)]
    mounted = ["unshare", "-Urm", "sh", "-c", MOUNT, "sh", str(tmp_path), *command]
    run = subprocess.run(mounted, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    if run.returncode == 77 or run.stderr.startswith("unshare:"):
        pytest.skip(f"a small file system may not be mounted here: {run.stderr.strip()}")
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert len(found) > 20
    assert [step["sealed"] for step in found] == [False] * (len(found) - 1) + [True]
    assert {tuple(step["shards"]) for step in found} == {(0,), (0, 1)}, "in the shard, in its index, and in the seal"
    for n_pages, step in enumerate(found[:-1]):
        said = re.search(r"CacheWriteError: .* cannot be written \(No space left on device\): it needs ([\d,]+) bytes "
                         r"and ([\d,]+) are free\. What was committed stays; free some", step["error"])  # fmt: skip
        assert said, step["error"]
        assert int(said[2].replace(",", "")) <= 4096 * n_pages


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not write")
def test_a_place_that_may_not_be_written_or_read(many_caches):
    many_caches.chmod(0o755)
    folder = many_caches / "denied"
    folder.mkdir()
    command = [sys.executable, "-W", "error", "-m", "tests.storage.lifecycle.refused", "denied", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["sealed"], "with the right to write it completes"
    said = found["value"]
    assert (said["records"], said["unchanged"]) == (True, True)
    assert re.search(
        r"CacheWriteError: .* shard 1 cannot be written \(Permission denied\): .* fix the permis", said["capture"]
    )
    assert re.search(r"CacheWriteError: .*denied is not writable; name another folder", said["create"])
    assert re.search(r"CacheWriteError: .* the removal of index/000000.parquet cannot be", said["withdraw"])
    folder_closed, file_closed = found["index"]["value"], found["index/000000.parquet"]["value"]
    for closed in (folder_closed, file_closed):
        assert re.search(r"DamagedCacheError: .*/index.* cannot be read \(Permission denied\)", closed["open"])
    assert file_closed["verify"] == ["index/000000.parquet"]
    assert "cannot be read" in folder_closed["verify"], "a folder that cannot be listed is not an empty one"


def test_a_sector_that_cannot_be_read(tmp_path, monkeypatch):
    """The disk returns EIO: the error names the object, and verify lists it and continues."""
    make_cache(tmp_path)
    bad = tmp_path / "shards" / "000001-a1" / "affinity" / "c" / "0"
    read_bytes = Path.read_bytes

    def failing(path):
        if path == bad:
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(DamagedCacheError, match=r"000001-a1/affinity/c/0: cannot be read \(Input/output error\)"):
        Cache.open(tmp_path).record(2)
    assert [damage.name for damage in verify(tmp_path)] == ["shards/000001-a1/affinity/c/0"]
    assert Cache.open(tmp_path).record(0).key


def test_whatever_is_written_says_how_much_room_it_needs(tmp_path, monkeypatch):
    files = LocalFiles(tmp_path)
    files.create("there", b"1")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (files.create, files.replace):
        with pytest.raises(
            CacheWriteError, match=r"new cannot be written \(No space left on device\): it needs 5,000 by"
        ):
            write("new", bytes(5000))
    with pytest.raises(CacheWriteError, match="the removal of there cannot be"):
        files.delete("there")
    assert [path.name for path in tmp_path.iterdir()] == []
