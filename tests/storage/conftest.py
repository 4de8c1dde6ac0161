"""A small sealed cache, shared by the tests that only read it."""

import pytest

from .builders import make_cache


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """3 shards of 2, 2 and 1 rows; row 3 is skipped. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("shared") / "cache"
    make_cache(folder)
    return folder
