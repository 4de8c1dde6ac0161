"""The reader's interface."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from emkd.errors import (
    CacheConflictError,
    CacheIncompleteError,
    CacheVersionError,
    DamagedCacheError,
    InputNotFoundError,
    OutputExistsError,
    SampleNotFoundError,
    UsageError,
)
from emkd.storage.cache import Cache, create_cache
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import FORMAT_VERSION
from emkd.storage.manifest.plan import ShardPlan
from emkd.storage.record import CapturedRow, RowHint
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import (
    TOKENIZER_JSON,
    array_fields,
    make_cache,
    make_manifest,
    make_record,
    make_rows,
    row_of,
    text_sha256,
)


def test_importing_storage_needs_neither_torch_nor_transformers_nor_ray():
    code = (
        "import sys, emkd.storage.cache, emkd.storage.shards.writer, emkd.storage.lifecycle.seal\n"
        "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_record_needs_numpy_alone():
    code = (
        "import sys\nfrom emkd.storage import Record\n"
        "print([m for m in ('zarr', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_face_of_the_package():
    import emkd.storage

    assert sorted(emkd.storage.__all__) == sorted(emkd.storage._HOMES)
    for name in emkd.storage.__all__:
        assert getattr(emkd.storage, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        emkd.storage.nothing  # noqa: B018


def test_create_open_and_come_back(tmp_path):
    manifest = make_manifest()
    create_cache(tmp_path / "new" / "cache", manifest, TOKENIZER_JSON)
    again = create_cache(f"file://{tmp_path}/new/cache", make_manifest(created_by={"emkd": "0.2.0"}), TOKENIZER_JSON)
    assert json.loads(again.read("manifest.json"))["created_by"] == {"emkd": "0.1.0"}


def test_another_manifest_is_a_conflict(tmp_path):
    create_cache(tmp_path, make_manifest(), TOKENIZER_JSON)
    with pytest.raises(CacheConflictError, match=r"top_k: cache has 4, this run 5\nUse the settings"):
        create_cache(tmp_path, make_manifest(top_k=5), TOKENIZER_JSON)
    with pytest.raises(CacheConflictError, match=r"tokenizer\.json: the cache has a different tokenizer"):
        create_cache(tmp_path, make_manifest(), b"{}")


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"1 files that are not a cache \(thesis\.tex"):
        create_cache(tmp_path, make_manifest(), TOKENIZER_JSON)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_cache(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputNotFoundError, match="no cache at"):
            Cache.open(folder)
    assert not (tmp_path / "absent").exists()


def test_an_unsealed_cache_opens_only_when_asked(tmp_path):
    make_cache(tmp_path, shards=[2, 0], sealed=False)
    with pytest.raises(CacheIncompleteError, match=r"2 of 3 shards are committed; .* --partial"):
        Cache.open(tmp_path)
    cache = Cache.open(tmp_path, partial=True)
    assert (cache.sealed, cache.seal) == (False, None)
    assert (cache.shards, cache.shard_sizes) == ((0, 2), (2, 1))
    assert cache.sample_rows.tolist() == [0, 1, 4]
    assert [cache.samples_of_shard(n) for n in cache.shards] == [range(0, 2), range(2, 3)]
    assert cache.record(2).key == cache.sample_keys[2]
    with pytest.raises(SampleNotFoundError, match="no shard 1 among 2 shards"):
        cache.read_shard(1)


def test_a_newer_cache_says_so(tmp_path):
    make_cache(tmp_path, sealed=False)
    value = json.loads((tmp_path / "manifest.json").read_text()) | {"format_version": FORMAT_VERSION + 1}
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(CacheVersionError, match="format version 5; this emkd reads versions up to 4"):
        Cache.open(tmp_path, partial=True)


def test_partial_without_a_tokenizer(tmp_path):
    make_cache(tmp_path, sealed=False)
    assert Cache.open(tmp_path, partial=True).tokenizer_json == TOKENIZER_JSON
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DamagedCacheError, match=r"tokenizer\.json: missing"):
        Cache.open(tmp_path, partial=True).tokenizer_json  # noqa: B018


def test_the_index_of_samples(cache_folder):
    cache = Cache.open(cache_folder)
    assert cache.sealed
    assert len(cache) == cache.n_samples == cache.seal.n_samples == 4
    assert cache.manifest == make_manifest()
    assert cache.tokenizer_json == TOKENIZER_JSON
    assert cache.sample_rows.tolist() == [0, 1, 2, 4]
    assert (cache.shards, cache.shard_sizes) == ((0, 1, 2), (2, 1, 1))
    assert cache.rows_of_shard(1) == range(2, 4)
    assert cache.skipped.to_pylist()[0] | {"key": ""} == {
        "row": 3, "id": "id-3", "key": "", "text_sha256": text_sha256(3), "reason": "no_answer",
        "detail": "empty turn", "shard": 1,
    }  # fmt: skip
    assert cache.samples["text_sha256"].to_pylist() == [text_sha256(row) for row in (0, 1, 2, 4)]
    assert cache.knows_texts
    info = cache.sample_info(2)
    expected = make_rows(cache.manifest, 1)[0].record
    assert (info.number, info.row, info.id, info.shard) == (2, 2, "id-2", 1)
    assert (info.n_text, info.n_vision, info.n_answer) == (7, 6, 2)
    assert (info.key, info.images) == (expected.key, expected.images)
    for i in (-1, 4):
        with pytest.raises(SampleNotFoundError, match=f"no sample {i}, it has 4 samples"):
            cache.record(i)


def test_a_window_of_decoded_shards(cache_folder):
    cache = Cache.open(cache_folder, window=2)
    keys = cache.sample_keys
    for i in (0, 1, 2, 0, 3, 2):
        assert cache.record(i).key == keys[i]
    assert list(cache._decoded) == [2, 1]
    with pytest.raises(ValueError, match="window is 0"):
        Cache.open(cache_folder, window=0)


def test_another_process_reads_its_own_shards(cache_folder):
    cache = Cache.open(cache_folder)
    record = cache.record(3)
    other = pickle.loads(pickle.dumps(cache))  # noqa: S301 (what a data loader does)
    assert len(other._decoded) == 0
    np.testing.assert_array_equal(other.record(3).vision.logits, record.vision.logits)


def test_find(cache_folder):
    cache = Cache.open(cache_folder)
    for i, key in enumerate(cache.sample_keys):
        assert cache.find(key) == cache.find(key[:6]) == i
    assert cache.find("id-4") == 3
    with pytest.raises(SampleNotFoundError, match="at least 6 characters"):
        cache.find(cache.sample_keys[0][:5])
    with pytest.raises(SampleNotFoundError, match="no sample has the key or id ''"):
        cache.find("")
    with pytest.raises(SampleNotFoundError, match=r"row 3 \(id 'id-3'\) was skipped: no_answer: empty turn"):
        cache.find("id-3")


def test_find_where_ids_and_keys_repeat(tmp_path):
    manifest = make_manifest(n_rows=4, rows_per_shard=4)
    keys = ["abcdef01" * 8, "abcdef02" * 8, "abcdef02" * 8, "12345678" * 8]
    ids = ["same", "same", "", ""]
    rows = []
    for row, (key, name) in enumerate(zip(keys, ids, strict=True)):
        record = make_record(np.random.default_rng(row), manifest, key=key)
        rows.append(CapturedRow(hint=RowHint(row=row, id=name), key=key, record=record))
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    commit_shard(files, write_shard(files, 0, "a", rows, manifest))
    cache = Cache.open(tmp_path, partial=True)
    assert cache.find(keys[1]) == 1  # the same content twice: the first one
    assert cache.find("abcdef02") == 1
    with pytest.raises(UsageError, match=f"2 samples have the id 'same'; name one by its key: {keys[0]}, "):
        cache.find("same")
    with pytest.raises(UsageError, match="3 keys start with 'abcdef'"):
        cache.find("abcdef")


def test_shards_without_samples(tmp_path):
    manifest = make_manifest(n_rows=3, rows_per_shard=1)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    for shard in range(3):
        rows = make_rows(manifest, shard, skip=(0, 2))
        commit_shard(files, write_shard(files, shard, "a", rows, manifest))
    seal(files)
    cache = Cache.open(tmp_path)
    assert (cache.shards, cache.shard_sizes, cache.n_samples) == ((0, 1, 2), (0, 1, 0), 1)
    assert len(cache.read_shard(0)) == 0
    assert cache.record(0).key == cache.sample_keys[0]


def test_an_empty_plan(tmp_path):
    manifest = make_manifest()
    manifest = manifest.model_copy(update={"plan": ShardPlan.of(n_rows=0, rows_per_shard=2)})
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    seal(files)
    assert (Cache.open(tmp_path).n_samples, Cache.open(tmp_path).shards) == (0, ())


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("affinity", ["int8", "float32"])
def test_a_record_keeps_its_numbers_when_its_shards_memory_is_used_again(tmp_path, compression, affinity):
    """With a window of one shard, each shard is read into the memory of the one before it."""
    manifest = make_manifest(n_rows=6, rows_per_shard=1, logits="float32", affinity=affinity, compression=compression)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    for shard in range(6):
        row = row_of(make_record(np.random.default_rng(shard), manifest), shard)
        assert commit_shard(files, write_shard(files, shard, "a", [row], manifest))
    seal(files)
    cache = Cache.open(tmp_path, window=1)
    kept = [cache.record(i) for i in range(6)]
    for i, record in enumerate(kept):
        again = Cache.open(tmp_path).record(i)
        for name, array in array_fields(record).items():
            np.testing.assert_array_equal(array, array_fields(again)[name], err_msg=name)
