"""The operations on local disk."""

import os
import resource
import threading

import pytest

from emkd.errors import UsageError
from emkd.storage.objects.local import LocalFiles, open_files


def test_plain_paths_and_file_uris(tmp_path):
    (tmp_path / "a b").mkdir()
    for uri in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        assert open_files(uri) == LocalFiles(tmp_path / "a b")


@pytest.mark.parametrize("uri", ["s3://bucket/cache", "gs://bucket", "https://example.org/c", "file://host/c"])
def test_other_schemes_are_refused(uri):
    with pytest.raises(UsageError, match=r"only local paths .* supported by this version"):
        open_files(uri)


def test_create_only_if_absent(tmp_path):
    files = LocalFiles(tmp_path / "not" / "there")
    assert files.read("a/b") is None
    assert not files.exists("a/b")
    assert files.create("a/b", b"first")
    assert not files.create("a/b", b"second")
    assert files.read("a/b") == b"first"
    assert files.read("a") is None  # a folder is no object
    assert files.names() == ["a/b"]
    assert os.listdir(tmp_path / "not" / "there" / "a") == ["b"]  # nothing temporary stays


def test_of_many_creators_one_wins(tmp_path):
    files = LocalFiles(tmp_path)
    barrier, wins = threading.Barrier(8), []

    def race(i):
        barrier.wait()
        if files.create("object", bytes([i]) * 100_000):
            wins.append(i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert files.read("object") == bytes(wins) * 100_000
    assert files.names() == ["object"]


def test_write_sync_list_delete(tmp_path):
    files = LocalFiles(tmp_path)
    files.write("shards/0-a/x/c/0", b"12")
    files.write("shards/0-a/zarr.json", b"1")
    files.write("shards/1-a/zarr.json", b"1")
    with pytest.raises(FileExistsError):
        files.write("shards/0-a/zarr.json", b"2")
    files.sync_tree("shards/0-a")
    assert files.sizes("shards/0-a") == {"shards/0-a/x/c/0": 2, "shards/0-a/zarr.json": 1}
    assert files.folders("shards") == ["shards/0-a", "shards/1-a"]
    files.delete_tree("shards/0-a")
    files.delete_tree("shards/0-a")
    assert files.names() == ["shards/1-a/zarr.json"]
    assert os.listdir(tmp_path / "shards") == ["1-a"]


def test_what_a_crash_leaves_is_not_listed(tmp_path):
    (tmp_path / ".index.123.partial").write_bytes(b"half")
    (tmp_path / ".deleted-1").mkdir()
    (tmp_path / ".deleted-1" / "x").write_bytes(b"old")
    assert LocalFiles(tmp_path).names() == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd"])
def test_names_do_not_lead_outside(tmp_path, name):
    with pytest.raises(ValueError, match="leads outside"):
        LocalFiles(tmp_path).read(name)


def test_the_whole_cache_is_never_deleted(tmp_path):
    with pytest.raises(ValueError, match="refusing to delete the whole cache"):
        LocalFiles(tmp_path).delete_tree("")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """As on a full disk: here the limit is on the size of a file."""
    files = LocalFiles(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.create("object", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    assert files.create("object", bytes(5000))
