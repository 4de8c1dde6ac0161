"""The store in a local folder: the contract of every store, and what is particular to disks."""

import os
import resource

import pytest

from emkd.errors import UsageError
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.open import open_files
from tests.storage.objects.files import FilesTests


class TestLocalFiles(FilesTests):
    @pytest.fixture
    def files(self, tmp_path):
        return LocalFiles(tmp_path / "not" / "there")


def test_plain_paths_and_file_uris(tmp_path):
    (tmp_path / "a b").mkdir()
    for uri in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        assert open_files(uri) == LocalFiles(tmp_path / "a b")


@pytest.mark.parametrize("uri", ["s3://bucket/cache", "gs://bucket", "https://example.org/c", "file://host/c"])
def test_other_schemes_are_refused(uri):
    with pytest.raises(UsageError, match=r"only local paths .* supported by this version"):
        open_files(uri)


def test_nothing_temporary_stays(tmp_path):
    files = LocalFiles(tmp_path)
    files.create("a/b", b"first")
    files.create("a/b", b"second")
    files.replace("a/b", b"third")
    files.write("shards/0-a/zarr.json", b"1")
    files.delete_tree("shards/0-a")
    assert os.listdir(tmp_path / "a") == ["b"]
    assert os.listdir(tmp_path / "shards") == []


def test_what_a_crash_leaves_is_not_listed(tmp_path):
    (tmp_path / ".index.123.partial").write_bytes(b"half")
    (tmp_path / ".deleted-1").mkdir()
    (tmp_path / ".deleted-1" / "x").write_bytes(b"old")
    assert LocalFiles(tmp_path).names() == []


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """As on a full disk; simulated with a limit on the size of files."""
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
