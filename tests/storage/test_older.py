"""Read, resume, extend and repair caches of versions that stored neither chat template nor hashes of texts.

The golden cache of format version 1 is such a cache, too. Files on disk stay unchanged; new indexes have the new
column.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from emkd.errors import CacheConflictError
from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import commit_shard, missing_shards, read_index
from emkd.storage.index.table import FIRST_SCHEMA, TEXT_COLUMN, TEXT_SCHEMA, read_parquet
from emkd.storage.lifecycle.extend import extend_cache
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import FORMAT_VERSION, Manifest
from emkd.storage.objects.local import LocalFiles
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import (
    TOKENIZER_JSON,
    array_fields,
    keyed_rows,
    make_cache,
    make_manifest,
    make_rows,
    text_sha256,
    with_data,
)
from tests.storage.lifecycle.test_extend import state
from tests.storage.test_golden import GOLDEN

ADDED = [4, 1]  # row 1 of the golden cache, and a new one


def with_template(manifest: Manifest, sha256: str = "01" * 32) -> Manifest:
    changes = {"chat_template": "{{ messages }}", "chat_template_sha256": sha256}
    return manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update=changes)})


RUN = with_template(make_manifest(n_rows=3, rows_per_shard=2, logits="bfloat16", affinity="float32"))


@pytest.fixture
def older(tmp_path) -> LocalFiles:
    """A sealed cache as these versions wrote it: byte for byte, except for a null field of the manifest."""
    manifest = RUN.without("chat_template").in_format(1)
    files = create_cache(tmp_path / "cache", manifest, TOKENIZER_JSON)
    value = json.loads(files.read("manifest.json"))
    del value["tokenizer"]["chat_template"], value["compression"]
    (files.root / "manifest.json").write_text(json.dumps(value))
    for shard in range(2):
        index = write_shard(files, shard, f"a{shard}", make_rows(manifest, shard, skip=(2,)), manifest)
        assert commit_shard(files, replace(index, table=index.table.select(FIRST_SCHEMA.names)))
    seal(files)
    return files


def complete(files: LocalFiles, attempt: str = "new") -> None:
    """Write the missing shards, with the manifest on disk."""
    manifest = Cache.open(files.root, partial=True).manifest
    for shard in missing_shards(files, manifest):
        rows = make_rows(manifest, shard, skip=(2,), contents=ADDED if manifest.source(shard) else None)
        assert commit_shard(files, write_shard(files, shard, attempt, rows, manifest))
    seal(files)


def contents(files: LocalFiles) -> dict[str, bytes]:
    return {path: data for path, (data, _) in state(files).items()}


def columns(files: LocalFiles, name: str) -> list[str]:
    return read_parquet(name, files.read(name)).column_names


def test_the_golden_cache_has_neither():
    cache = Cache.open(GOLDEN / "v1")
    assert (cache.manifest.tokenizer.chat_template, cache.knows_texts) == (None, False)


def test_it_reads_as_it_was(older):
    assert columns(older, "index.parquet") == columns(older, "index/000000.parquet") == FIRST_SCHEMA.names
    cache = Cache.open(older.root)
    assert cache.manifest.tokenizer.chat_template is None
    assert not cache.knows_texts
    assert cache.samples[TEXT_COLUMN].to_pylist() == [None, None]
    assert cache.skipped.column_names[3] == TEXT_COLUMN
    assert [cache.record(i).key for i in range(2)] == cache.sample_keys
    (older.root / "seal.json").unlink()
    unsealed = Cache.open(older.root, partial=True)
    assert (unsealed.sample_keys, unsealed.record(1).key) == (cache.sample_keys, cache.sample_keys[1])


def test_a_job_that_was_killed_before_its_seal_ends_with_the_same_bytes(older):
    """The newer run agrees with the cache, and writes the same consolidated index and seal."""
    whole = contents(older)
    (older.root / "seal.json").unlink()
    (older.root / "index.parquet").unlink()
    create_cache(older.root, RUN, TOKENIZER_JSON)
    complete(older)
    assert contents(older) == whole
    with pytest.raises(CacheConflictError, match="tokenizer.chat_template_sha256: cache has"):
        create_cache(older.root, with_template(RUN, "02" * 32), TOKENIZER_JSON)


def test_records_of_both_formats_are_the_same(older, tmp_path):
    """A shard of the first format gives the same records as the same rows do today."""
    today = make_cache(tmp_path / "today", RUN, skip=(2,))
    assert Cache.open(today.root).manifest.format_version == FORMAT_VERSION
    for i in range(2):
        then, now = Cache.open(older.root).record(i), Cache.open(today.root).record(i)
        assert (then.key, then.images) == (now.key, now.images)
        for name, array in array_fields(then).items():
            np.testing.assert_array_equal(array, array_fields(now)[name], err_msg=name)


def test_a_missing_shard_is_made_with_the_new_column(older):
    (older.root / "seal.json").unlink()
    (older.root / "index.parquet").unlink()
    (older.root / "index/000001.parquet").unlink()
    create_cache(older.root, RUN, TOKENIZER_JSON)
    complete(older)
    assert verify(older.root) == []
    assert columns(older, "index/000000.parquet") == FIRST_SCHEMA.names
    assert columns(older, "index/000001.parquet") == columns(older, "index.parquet") == TEXT_SCHEMA.names
    cache = Cache.open(older.root)
    assert not cache.knows_texts
    assert cache.skipped[TEXT_COLUMN].to_pylist() == [text_sha256(2)]
    assert [cache.record(i).key for i in range(2)] == cache.sample_keys


def test_it_is_extended(older):
    before = state(older)
    extend_cache(older, with_data(RUN, "e" * 64, 2), TOKENIZER_JSON, lambda: keyed_rows(ADDED))
    complete(older)
    assert verify(older.root) == []
    assert {name: data for name, data in state(older).items() if name in before} == before
    cache = Cache.open(older.root)
    assert cache.samples[TEXT_COLUMN].to_pylist() == [None, None, text_sha256(4)]
    assert [cache.record(i).key for i in range(3)] == cache.sample_keys


@pytest.mark.parametrize("extended", [False, True])
def test_a_damaged_manifest_comes_back_without_a_template(older, extended):
    """A newer run's manifest has a template, so its hash is not the one that the indexes of the shards name."""
    if extended:
        extend_cache(older, with_data(RUN, "e" * 64, 2), TOKENIZER_JSON, lambda: keyed_rows(ADDED))
        complete(older)
    (older.root / "manifest.json").write_bytes(b"{")
    with pytest.raises(CacheConflictError, match="written with settings or data that differ"):
        withdraw(older, verify(older.root), with_template(RUN, "02" * 32), TOKENIZER_JSON)
    assert withdraw(older, verify(older.root), RUN, TOKENIZER_JSON) == []
    assert json.loads(older.read("manifest.json"))["tokenizer"]["chat_template"] is None
    complete(older)
    assert verify(older.root) == []
    assert read_index(older, 0).attempt == "a0"


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_the_second_format_is_gone_on_with(tmp_path, compression):
    """An older emkd starts a cache and is killed, the manifest is damaged; today's emkd resumes in the old format."""
    run = make_manifest(n_rows=3, rows_per_shard=2, compression=compression, n_tokens=140_000)
    second = run.in_format(2)
    files = make_cache(tmp_path / "cache", second, sealed=False, shards=(0,))
    before = contents(files)
    create_cache(files.root, run, TOKENIZER_JSON)
    (files.root / "manifest.json").write_bytes(b"{")
    withdraw(files, verify(files.root), run, TOKENIZER_JSON)
    complete(files)
    assert verify(files.root) == []
    assert {name: data for name, data in contents(files).items() if name in before} == before
    cache = Cache.open(files.root)
    assert (cache.manifest.format_version, cache.manifest.compression) == (2, compression)
    arrays = [set(cache.read_shard(shard).arrays) for shard in cache.shards]
    assert all(("vision_ids" in names) == (compression == "lz4") for names in arrays)
    for shard in cache.shards:
        for number, row in zip(cache.samples_of_shard(shard), make_rows(run, shard), strict=False):
            np.testing.assert_array_equal(cache.record(number).vision.ids, row.record.vision.ids)
