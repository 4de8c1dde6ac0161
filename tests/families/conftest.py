"""A teacher, its cache and a student of each family."""

import pytest

from emkd.storage.cache import Cache
from tests import families, tiny
from tests.families.naive import ROWS, STUDENT, TEACHER


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "rows.parquet", ROWS)


@pytest.fixture(scope="session", params=families.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def teacher(family, tmp_path_factory):
    return families.save(family, tmp_path_factory.mktemp("teacher"), **TEACHER)


@pytest.fixture(scope="session")
def student(family, tmp_path_factory):
    return families.save(family, tmp_path_factory.mktemp("student"), **STUDENT)


@pytest.fixture(scope="session")
def cache(teacher, data, tmp_path_factory):
    return Cache.open(tiny.make_cache(teacher, data, tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(scope="session")
def students(tmp_path_factory):
    return {name: families.save(name, tmp_path_factory.mktemp(name), **STUDENT) for name in families.FAMILIES}
