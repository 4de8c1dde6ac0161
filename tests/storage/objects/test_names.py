"""Names of objects, and what each name says."""

import pytest

from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import (
    committed_shards,
    extension_of,
    index_name,
    indexed_shard,
    plan_name,
    seal_name,
    shard_of_folder,
    shard_of_object,
    shard_prefix,
    table_name,
)


@pytest.mark.parametrize("shard", [0, 7, 999_999, 1_000_000])
def test_a_shards_names_say_its_number(shard):
    assert indexed_shard(index_name(shard)) == shard
    assert shard_of_folder(shard_prefix(shard, "a0")) == shard
    assert shard_of_object(f"{shard_prefix(shard, 'a0')}/text_ids/c/0") == shard
    assert shard_of_object(index_name(shard)) == shard


@pytest.mark.parametrize("extension", [1, 12])
def test_an_extensions_names_say_its_number(extension):
    for name in (plan_name(extension), seal_name(extension), table_name(extension)):
        assert extension_of(name) == extension
        assert shard_of_object(name) is None


def test_a_cache_without_extensions_has_its_files_at_the_root():
    assert (seal_name(0), table_name(0)) == ("seal.json", "index.parquet")


@pytest.mark.parametrize(
    "name",
    ["index/1.parquet", "index/000001.parquet.tmp", "shards/000001", "shards/x-a", "extensions/000001/x", "seal.json"],
)
def test_other_names_say_nothing(name):
    assert indexed_shard(name) is extension_of(name) is shard_of_object(name) is None


def test_committed_are_those_with_an_index(tmp_path):
    files = LocalFiles(tmp_path)
    for name in (index_name(3), index_name(1), "index/README", f"{shard_prefix(2, 'a')}/zarr.json"):
        files.create(name, b"")
    assert committed_shards(files) == [1, 3]


@pytest.mark.parametrize("attempt", ["a/b", "", "../x"])
def test_an_attempt_cannot_lead_elsewhere(attempt):
    with pytest.raises(ValueError, match="expected letters"):
        shard_prefix(0, attempt)
