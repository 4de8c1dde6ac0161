"""A cache with more rows than it was started with."""

import json
import shutil

import pytest

from emkd.errors import CacheConflictError, CacheIncompleteError, DamagedCacheError, InputNotFoundError
from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import commit_shard, delete_lost_attempts, missing_shards
from emkd.storage.lifecycle.extend import extend_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.conflicts import conflicts
from emkd.storage.manifest.manifest import FORMAT_VERSION, Manifest
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import plan_name
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import (
    TOKENIZER_JSON,
    content_record,
    keyed_rows,
    make_cache,
    make_manifest,
    make_rows,
    with_data,
)

FIRST = [0, 1, 2, 3, 4]  # contents of the first dataset; 3 is skipped, shards of 2, 2 and 1 rows
SECOND = [7, 1, None, 3, 8, 0, 7]  # of another one: rows 1, 3 and 5 are in the cache, and row 6 repeats row 0
MANIFEST = make_manifest()
RUN = with_data(MANIFEST, "e" * 64, len(SECOND))


def extend(files, run=RUN, contents=SECOND):
    return extend_cache(files, run, TOKENIZER_JSON, lambda: keyed_rows(contents))


def complete(files, contents=(FIRST, SECOND), attempt="e"):
    manifest = read_manifest(files)
    for shard in missing_shards(files, manifest):
        rows = make_rows(manifest, shard, contents=contents[manifest.source(shard)])
        assert commit_shard(files, write_shard(files, shard, attempt, rows, manifest))
    seal(files)


@pytest.fixture
def files(tmp_path):
    return make_cache(tmp_path / "cache", MANIFEST)


@pytest.fixture
def extended(files):
    extend(files)
    complete(files)
    return files


def state(files):
    """Content and modification time of every file."""
    paths = sorted(path for path in files.root.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_only_what_is_missing_is_added(files):
    manifest = extend(files)
    assert [(n, list(manifest.rows(n))) for n in manifest.shards] == [
        (0, [0, 1]), (1, [2, 3]), (2, [4]), (3, [0, 2]), (4, [4, 6])
    ]  # fmt: skip
    assert [manifest.source(n) for n in manifest.shards] == [0, 0, 0, 1, 1]
    assert missing_shards(files, manifest) == [3, 4]


def test_what_was_committed_is_not_touched(files):
    before = state(files)
    extend(files)
    complete(files)
    after = state(files)
    assert before == {path: after[path] for path in before}
    assert sorted(str(path.relative_to(files.root)) for path in after.keys() - before.keys() if "zarr" not in str(path)
                  and "/c/" not in str(path)) == [
        "extensions/000001/index.parquet", "extensions/000001/plan.json", "extensions/000001/seal.json",
        "index/000003.parquet", "index/000004.parquet",
    ]  # fmt: skip


def test_reading_all_generations(extended):
    cache = Cache.open(extended.root)
    assert cache.sealed
    assert verify(extended.root) == []
    assert cache.sample_rows.tolist() == [0, 1, 2, 4, 0, 4, 6]
    contents = [0, 1, 2, 4, 7, 8, 7]
    for i, content in enumerate(contents):
        expected = content_record(content, MANIFEST)
        assert (cache.sample_keys[i], cache.record(i).key) == (expected.key, expected.key)
        assert cache.record(i).vision.logits.tolist() == expected.vision.logits.tolist()
        assert cache.find(expected.key) == contents.index(content)
    skipped = [(row["shard"], row["row"], row["reason"]) for row in cache.skipped.to_pylist()]
    assert skipped == [(1, 3, "no_answer"), (3, 2, "unreadable")]
    assert (cache.seal.n_samples, cache.seal.n_skipped, cache.seal.n_shards) == (7, 2, 5)
    records = [content_record(content, MANIFEST) for content in contents]
    assert cache.totals.vision_tokens == sum(len(record.vision.ids) for record in records)
    assert sum(cache.totals.n_bytes.values()) == sum(extended.sizes("shards").values())
    assert (cache.shards, cache.shard_sizes) == ((0, 1, 2, 3, 4), (2, 1, 1, 1, 2))
    assert cache.manifest.n_rows == cache.n_samples + len(cache.skipped)


def test_the_same_again_changes_nothing(extended):
    before = state(extended)
    assert extend(extended) == read_manifest(extended)
    seal(extended)
    assert create_cache(extended.root, RUN, TOKENIZER_JSON) == extended, "the run agrees, without --extend as well"
    assert create_cache(extended.root, MANIFEST, TOKENIZER_JSON) == extended, "and so does the command that created it"
    assert state(extended) == before


def test_nothing_to_add_to_a_sealed_cache(files):
    before = state(files)
    fewer = with_data(MANIFEST, "e" * 64, 3)
    assert extend(files, fewer, [4, 2, 1]).extensions == ()
    assert state(files) == before


def test_other_settings_and_other_rows_are_refused(files):
    before = state(files)
    with pytest.raises(CacheConflictError, match=r"\n  top_k: cache has 4, this run 5\n(?!.*--extend)"):
        extend(files, RUN.model_copy(update={"top_k": 5}))
    with pytest.raises(CacheConflictError, match=r"tokenizer\.json: the cache has a different tokenizer"):
        extend_cache(files, RUN, b"{}", lambda: [])
    with pytest.raises(CacheConflictError, match=r"(?s)dataset\.fingerprint: .*Other rows can be added with --extend"):
        create_cache(files.root, RUN, TOKENIZER_JSON)
    assert all(line.startswith(("dataset.", "plan.")) for line in conflicts(MANIFEST, RUN))
    assert state(files) == before
    with pytest.raises(InputNotFoundError, match="no cache at"):
        extend(LocalFiles(files.root / "absent"))


def test_between_the_plan_and_its_seal_a_cache_is_not_sealed(files):
    extend(files)
    with pytest.raises(CacheIncompleteError, match="3 of 5 shards are committed"):
        Cache.open(files.root)
    assert Cache.open(files.root, partial=True).shards == (0, 1, 2)
    with pytest.raises(CacheIncompleteError, match=r"2 of 5 shards are missing \(the first is 3, of eeee\.parquet\)"):
        seal(files)
    assert verify(files.root) == []
    complete(files)
    assert Cache.open(files.root).sealed


def test_who_opens_while_an_extension_is_planned_sees_the_cache_before(files, monkeypatch):
    from emkd.storage import cache as module

    def slow_read_seal(*arguments):
        found = read_seal(*arguments)
        extend(files)
        return found

    read_seal = module.read_seal
    monkeypatch.setattr(module, "read_seal", slow_read_seal)
    cache = Cache.open(files.root)
    assert (cache.sealed, cache.shards) == (True, (0, 1, 2))
    assert [cache.record(i).key for i in range(4)] == cache.sample_keys


def test_an_unfinished_cache_is_not_extended(tmp_path):
    """A run of 5 rows was killed after shard 1, or still works: its other shards must stay in the plan."""
    files = make_cache(tmp_path, MANIFEST, shards=[1], sealed=False)
    seven = make_manifest(n_rows=7)
    more = MANIFEST.model_copy(update={"dataset": seven.dataset, "plan": seven.plan})
    with pytest.raises(
        CacheIncompleteError,
        match=r"2 of 3 shards are not committed yet \(the first is 0, of train.parquet\); finish them first",
    ):
        extend(files, more, range(7))
    assert read_manifest(files).extensions == ()
    make_cache(tmp_path, MANIFEST, shards=[0, 2], sealed=False)
    manifest = extend(files, more, range(7))
    assert [list(manifest.rows(n)) for n in manifest.shards] == [[0, 1], [2, 3], [4], [5, 6]]


def test_a_chain_of_extensions(extended):
    third = with_data(MANIFEST, "d" * 64, 3, rows_per_shard=1)
    manifest = extend(extended, third, [8, 9, 0])
    assert (len(manifest.extensions), manifest.shards, list(manifest.rows(5))) == (2, (0, 1, 2, 3, 4, 5), [1])
    assert [(f.row, f.source, f.source_row) for f in manifest.extensions[1].found] == [(0, 1, 4), (2, 0, 0)]
    complete(extended, (FIRST, SECOND, [8, 9, 0]))
    cache = Cache.open(extended.root)
    assert (cache.n_samples, verify(extended.root)) == (8, [])
    for run in (MANIFEST, RUN, third):
        assert create_cache(extended.root, run, TOKENIZER_JSON)
    assert delete_lost_attempts(extended) == []


def test_a_plan_of_another_cache_is_refused(files, tmp_path):
    other = make_cache(tmp_path / "other", make_manifest(batch_tokens=9))
    extend(other, RUN.model_copy(update={"batch_tokens": 9}))
    shutil.copytree(other.root / "extensions", files.root / "extensions")
    for read in (lambda: Cache.open(files.root, partial=True), lambda: extend(files), lambda: seal(files)):
        with pytest.raises(DamagedCacheError, match=r"000001/plan\.json: does not extend this cache: .* another one"):
            read()
    assert [damage.name for damage in verify(files.root)] == ["extensions/000001/plan.json"]


def test_a_plan_that_is_gone_or_changed_is_refused(extended):
    path = extended.root / plan_name(1)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"kept": [[0, 3]]', b'"kept": [[0, 2]]'))
    assert path.read_bytes() != data
    (extended.root / "extensions/000001/seal.json").rename(extended.root / "seal")
    with pytest.raises(DamagedCacheError, match=r"plan\.json: content changed, it does not match its own hash"):
        Cache.open(extended.root, partial=True)
    (extended.root / "seal").rename(extended.root / "extensions/000001/seal.json")
    path.unlink()
    with pytest.raises(DamagedCacheError, match=r"000001/plan\.json: missing"):
        Cache.open(extended.root)
    assert [damage.name for damage in verify(extended.root)] == ["extensions/000001/plan.json"]


def test_the_manifest_file_has_no_extensions(extended):
    manifest = read_manifest(extended)
    assert Manifest.from_bytes(manifest.to_bytes()).extensions == ()
    value = json.loads(manifest.to_bytes()) | {"extensions": []}
    with pytest.raises(DamagedCacheError, match="each extension has its own file"):
        Manifest.from_bytes(json.dumps(value).encode())
    assert (manifest.format_version, manifest.settings_sha256) == (FORMAT_VERSION, MANIFEST.settings_sha256)


def test_what_strayed_into_the_folder_is_no_extension(files):
    for name in ("extensions/.DS_Store", "extensions/000007/.nfs0001", "extensions/notes/plan.json"):
        files.write(name, b"")
    assert Cache.open(files.root).sealed
    assert verify(files.root) == []
    assert extend(files).extensions[0].number == 1
