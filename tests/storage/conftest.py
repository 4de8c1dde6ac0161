"""A small sealed cache, shared by the tests that only read it, and a folder for hundreds of small caches."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.storage.builders import make_cache


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """3 shards of 2, 2 and 1 rows; row 3 is skipped. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("shared") / "cache"
    make_cache(folder)
    return folder


@pytest.fixture(scope="module")
def many_caches(tmp_path_factory):
    """A folder in memory if the system has one, since hundreds of caches call fsync often."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("many")
        return
    folder = Path(tempfile.mkdtemp(prefix="emkd-test-", dir=memory))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
