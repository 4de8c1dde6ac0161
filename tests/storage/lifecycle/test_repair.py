"""Repair deletes damaged objects and does not touch intact ones."""

import pytest

from emkd.errors import CacheConflictError, DamagedCacheError
from emkd.storage.cache import Cache, verify
from emkd.storage.index.commit import commit_shard, missing_shards, read_index
from emkd.storage.lifecycle.extend import extend_cache
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.lifecycle.seal import seal
from emkd.storage.lifecycle.verify import Damage
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import plan_name
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import TOKENIZER_JSON, keyed_rows, make_cache, make_manifest, make_rows, with_data
from tests.storage.lifecycle.test_extend import SECOND, complete, state

MANIFEST = make_manifest()


@pytest.fixture
def files(tmp_path):
    return make_cache(tmp_path / "cache", MANIFEST)


@pytest.fixture
def extended(files):
    extend_cache(files, with_data(MANIFEST, "e" * 64, len(SECOND)), TOKENIZER_JSON, lambda: keyed_rows(SECOND))
    complete(files)
    return files


def repair(files, run=MANIFEST, tokenizer=TOKENIZER_JSON):
    return withdraw(files, verify(files.root), run, tokenizer)


def change(files, name, old=b"", new=b"x"):
    data = files.read(name)
    (files.root / name).write_bytes(data.replace(old, new, 1) if old else data[:-9] + new + data[-8:])


def attempts(files):
    return {shard: read_index(files, shard).attempt for shard in Cache.open(files.root).shards}


def test_nothing_is_damaged_and_nothing_changes(extended):
    before = state(extended)
    assert repair(extended) == []
    assert repair(extended, make_manifest(top_k=1), b"{}") == []
    assert state(extended) == before


@pytest.mark.parametrize(
    "name", ["seal.json", "index.parquet", "manifest.json", "tokenizer.json", "index/000001.parquet"]
)
def test_only_what_is_damaged_is_made_anew(files, name):
    whole = {
        path: data for path, data in state(files).items() if path.name != "seal.json" and path != files.root / name
    }
    change(files, name)
    shards = [1] if name.startswith("index/") else []
    assert [damage.name for damage in verify(files.root)] == [name]
    assert repair(files) == shards
    assert not files.exists("seal.json"), "it vouches for what is no longer there"
    assert missing_shards(files, MANIFEST) == shards
    complete(files)
    assert verify(files.root) == []
    assert attempts(files) == {0: "a0", 1: "e" if shards else "a1", 2: "a2"}
    after = state(files)
    kept = {path for path in whole if path.name != "index.parquet"}
    assert {path: after[path] for path in kept} == {path: whole[path] for path in kept}


def test_an_added_shard_is_made_anew_as_well(extended):
    change(extended, "shards/000004-e/affinity/c/0")
    change(extended, "shards/000000-a0/zarr.json")
    assert repair(extended) == [0, 4]
    complete(extended, attempt="again")
    assert verify(extended.root) == []
    assert attempts(extended) == {0: "again", 1: "a1", 2: "a2", 3: "e", 4: "again"}


@pytest.mark.parametrize("sealed", [True, False])
def test_only_the_same_run_restores_a_manifest(extended, sealed):
    if not sealed:
        extended.delete("extensions/000001/seal.json")
    change(extended, "manifest.json", b'"batch_tokens": 1024', b'"batch_tokens": 1025')
    assert [damage.name for damage in verify(extended.root)] == ["manifest.json"], "not the shards written under it"
    before = state(extended)
    for other in (make_manifest(top_k=5), make_manifest(batch_tokens=1025), with_data(MANIFEST, "e" * 64, len(SECOND))):
        with pytest.raises(CacheConflictError, match=r"manifest\.json is damaged, and .* run exactly the command that"):
            repair(extended, other)
    assert state(extended) == before
    assert repair(extended, make_manifest(created_by={"emkd": "9"})) == []
    complete(extended)
    assert (verify(extended.root), attempts(extended)) == ([], {0: "a0", 1: "a1", 2: "a2", 3: "e", 4: "e"})


def test_a_manifest_that_only_an_extension_still_knows(extended):
    """Every shard of the first plan is damaged, too: the new manifest must have the hash that the extension names."""
    for name in ("manifest.json", *(f"index/00000{n}.parquet" for n in range(3))):
        change(extended, name)
    with pytest.raises(CacheConflictError, match=r"000001/plan\.json was written with settings or data that differ"):
        repair(extended, make_manifest(top_k=3))
    assert repair(extended) == [0, 1, 2]


def test_a_manifest_that_is_gone(files):
    files.delete("seal.json")
    files.delete("manifest.json")
    with pytest.raises(DamagedCacheError, match=r"manifest\.json: missing"):
        Cache.open(files.root, partial=True)
    assert [damage.name for damage in verify(files.root)] == ["manifest.json"]
    assert repair(files) == []
    complete(files)
    assert attempts(files) == {0: "a0", 1: "a1", 2: "a2"}


def test_another_run_withdraws_nothing(extended):
    change(extended, "tokenizer.json")
    change(extended, "shards/000004-e/affinity/c/0")
    before = state(extended)
    with pytest.raises(CacheConflictError, match="top_k: cache has 4, this run 5"):
        repair(extended, make_manifest(top_k=5))
    with pytest.raises(ValueError, match="not the tokenizer of the run"):
        repair(extended, tokenizer=b"{}")
    assert state(extended) == before


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("how", ["changed", "gone", "of another cache"])
def test_a_plan_comes_back_from_a_copy_only(extended, tmp_path, sealed, how):
    plan, original = extended.root / plan_name(1), extended.read(plan_name(1))
    if not sealed:
        extended.delete("extensions/000001/seal.json")
        extended.delete("extensions/000001/index.parquet")
    if how == "changed":
        change(extended, plan_name(1), b'"row": 1', b'"row": 3')
    elif how == "gone":
        plan.unlink()
    else:
        other = make_cache(tmp_path / "other", MANIFEST)
        extend_cache(other, with_data(MANIFEST, "e" * 64, 3), TOKENIZER_JSON, lambda: keyed_rows([4, 7, 8]))
        plan.write_bytes(other.read(plan_name(1)))
    assert [damage.name for damage in verify(extended.root)] == [plan_name(1)]
    before = state(extended)
    with pytest.raises(DamagedCacheError, match="cannot be rebuilt from the other files: restore it"):
        repair(extended)
    assert state(extended) == before
    plan.write_bytes(original)
    seal(extended)
    assert (verify(extended.root), attempts(extended)) == ([], {0: "a0", 1: "a1", 2: "a2", 3: "e", 4: "e"})


def test_the_way_out_without_a_copy(extended):
    """The error says: delete the folder of the newest plan and add the same data again; nothing is computed twice."""
    (extended.root / plan_name(1)).write_bytes(b"")
    for name in extended.names("extensions"):
        extended.delete(name)
    extend_cache(extended, with_data(MANIFEST, "e" * 64, len(SECOND)), TOKENIZER_JSON, lambda: keyed_rows(SECOND))
    assert missing_shards(extended, read_manifest(extended)) == []
    seal(extended)
    assert (verify(extended.root), attempts(extended)) == ([], {0: "a0", 1: "a1", 2: "a2", 3: "e", 4: "e"})


@pytest.mark.parametrize("sealed", [True, False])
def test_a_reader_that_is_open_gets_an_error_or_the_same_rows(tmp_path, sealed):
    files = make_cache(tmp_path, MANIFEST, sealed=sealed)
    cache = Cache.open(tmp_path, partial=True, window=1)
    damage = [Damage(name="index/000000.parquet", what="for the test")]
    withdraw(files, damage, MANIFEST, TOKENIZER_JSON)
    with pytest.raises(DamagedCacheError, match=r"index/000000\.parquet: missing"):
        cache.record(0)
    commit_shard(files, write_shard(files, 0, "b", make_rows(MANIFEST, 0, skip=(0,)), MANIFEST))
    with pytest.raises(
        DamagedCacheError, match="bytes, expected" if sealed else "its rows have changed since the cache was"
    ):
        cache.record(0)
    assert cache.record(2).key == cache.sample_keys[2]


def test_a_place_without_a_cache(tmp_path):
    assert withdraw(LocalFiles(tmp_path), [], MANIFEST, TOKENIZER_JSON) == []


def test_what_cannot_be_read_now_is_not_withdrawn(files):
    """It may be intact: a disk that fails for a moment must not cost committed shards."""
    victim = next((files.root / "shards").glob("000001-*/affinity/c/0"))
    victim.unlink()
    victim.symlink_to(victim)  # reading it is an error of the system, not a missing file
    before = state(files).keys()
    with pytest.raises(DamagedCacheError, match="cannot be read now, but may be intact: nothing was changed"):
        repair(files)
    assert state(files).keys() == before
    victim.unlink()
    assert repair(files) == [1]
