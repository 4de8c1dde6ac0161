"""Commit, races, resume and the seal."""

import json
import resource
import threading

import pytest

from emkd.errors import CacheIncompleteError, CacheWriteError, DamagedCacheError, InputNotFoundError
from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import ShardIndex, commit_shard, delete_lost_attempts, missing_shards, read_index
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.lifecycle.seal import seal
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import committed_shards
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import TOKENIZER_JSON, make_cache, make_manifest, make_rows


@pytest.fixture
def manifest():
    return make_manifest()


@pytest.fixture
def files(tmp_path, manifest):
    return create_cache(tmp_path, manifest, TOKENIZER_JSON)


def test_of_two_attempts_one_wins_and_the_other_goes(files, manifest):
    rows = make_rows(manifest, 0)
    first = write_shard(files, 0, "first", rows, manifest)
    second = write_shard(files, 0, "second", rows, manifest)
    assert commit_shard(files, second)
    assert not commit_shard(files, first)
    assert files.folders("shards") == ["shards/000000-second"]
    assert read_index(files, 0).attempt == "second"
    assert Cache.open(files.root, partial=True).record(0).key == rows[0].key


def test_a_real_race(files, manifest):
    rows = make_rows(manifest, 0)
    indexes = [write_shard(files, 0, f"a{i}", rows, manifest) for i in range(6)]
    barrier, results = threading.Barrier(6), {}

    def race(index):
        barrier.wait()
        results[index.attempt] = commit_shard(files, index)

    threads = [threading.Thread(target=race, args=(index,)) for index in indexes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [attempt for attempt, won in results.items() if won]
    assert len(winners) == 1
    assert files.folders("shards") == [f"shards/000000-{winners[0]}"]
    assert verify(files.root) == []


def test_committing_twice_keeps_what_was_committed(files, manifest):
    index = write_shard(files, 0, "a", make_rows(manifest, 0), manifest)
    assert commit_shard(files, index)
    assert commit_shard(files, index)
    assert verify(files.root) == []
    assert Cache.open(files.root, partial=True).n_samples == 2


def test_an_attempt_that_lost_bytes_is_not_committed(files, manifest):
    index = write_shard(files, 0, "a", make_rows(manifest, 0), manifest)
    (files.root / index.prefix / "text_ids" / "c" / "0").unlink()
    with pytest.raises(DamagedCacheError, match=r"text_ids/c/0: missing or of another size"):
        commit_shard(files, index)
    assert committed_shards(files) == []


def test_a_full_disk_leaves_no_half_shard(files, manifest):
    """Simulated with a limit on the size of files; the same attempt can be written again."""
    rows = make_rows(manifest, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(
            CacheWriteError, match=r"shard 0 cannot be written \(File too large\): it needs [\d,]+ bytes"
        ):
            write_shard(files, 0, "a", rows, manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.folders("shards") == []
    assert commit_shard(files, write_shard(files, 0, "a", rows, manifest))


def test_a_shard_without_an_index_does_not_exist(files, manifest):
    commit_shard(files, write_shard(files, 0, "a", make_rows(manifest, 0), manifest))
    write_shard(files, 1, "a", make_rows(manifest, 1), manifest)
    cache = Cache.open(files.root, partial=True)
    assert (cache.shards, cache.shard_sizes, cache.n_samples) == ((0,), (2,), 2)
    assert verify(files.root) == []


def test_resume_does_what_is_missing(files, manifest):
    assert missing_shards(files, manifest) == [0, 1, 2]
    commit_shard(files, write_shard(files, 1, "a", make_rows(manifest, 1), manifest))
    assert committed_shards(files) == [1]
    assert missing_shards(files, manifest) == [0, 2]
    with pytest.raises(
        CacheIncompleteError, match=r"2 of 3 shards are missing .* run cache-teacher again with that data"
    ):
        seal(files)
    make_cache(files.root, manifest, shards=[0, 2])
    assert missing_shards(files, manifest) == []
    assert Cache.open(files.root).n_samples == 4


def test_lost_attempts_are_deleted_and_unfinished_ones_stay(files, manifest):
    commit_shard(files, write_shard(files, 0, "won", make_rows(manifest, 0), manifest))
    write_shard(files, 0, "killed", make_rows(manifest, 0), manifest)
    write_shard(files, 1, "running", make_rows(manifest, 1), manifest)
    files.write("shards/.deleted-123/x", b"interrupted")
    assert delete_lost_attempts(files) == ["shards/.deleted-123", "shards/000000-killed"]
    assert files.folders("shards") == ["shards/000000-won", "shards/000001-running"]


def test_the_index_bytes_are_a_pure_function(files, manifest):
    index = write_shard(files, 0, "a", make_rows(manifest, 0), manifest)
    data = index.to_bytes()
    assert index.to_bytes() == data
    again = ShardIndex.from_bytes("index/000000.parquet", data)
    assert again == index
    assert again.to_bytes() == data


def test_seal_says_what_is_in_the_cache(tmp_path, manifest):
    files = make_cache(tmp_path, manifest)
    body = seal(files)
    assert (body.n_samples, body.n_skipped, body.n_shards) == (4, 1, 3)
    records = [row.record for n in range(3) for row in make_rows(manifest, n) if row.record]
    assert body.totals.vision_tokens == sum(len(record.vision.ids) for record in records)
    assert body.totals.text_tokens == sum(len(record.text_ids) for record in records)
    assert body.totals.answer_tokens == sum(len(record.answer.ids) for record in records)
    assert sum(body.totals.n_bytes.values()) == sum(files.sizes("shards").values())
    expected = set(files.names()) - set(files.names("shards")) - {"seal.json"}
    assert set(body.objects) == expected
    assert json.loads(files.read("seal.json"))["body"] == body.model_dump(exclude_none=True)


def test_sealing_again_or_at_once_agrees(tmp_path, manifest):
    files = make_cache(tmp_path, manifest, sealed=False)
    barrier, seals = threading.Barrier(4), []

    def race():
        barrier.wait()
        seals.append(seal(files))

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seals) == 4
    before = files.read("seal.json")
    assert [seal(files)] * 4 == seals
    assert files.read("seal.json") == before


def test_seal_after_a_kill_between_table_and_seal(tmp_path, manifest):
    files = make_cache(tmp_path, manifest)
    first = files.read("seal.json")
    (tmp_path / "seal.json").unlink()
    seal(files)
    assert files.read("seal.json") == first
    (tmp_path / "seal.json").unlink()
    other = make_cache(tmp_path.parent / "other", manifest, seed=1)
    (tmp_path / "index.parquet").write_bytes(other.read("index.parquet"))
    with pytest.raises(DamagedCacheError, match=r"index\.parquet: left by an earlier run, .* --repair"):
        seal(files)


def test_seal_refuses_a_shard_that_lost_an_object(tmp_path, manifest):
    files = make_cache(tmp_path, manifest, sealed=False)
    (tmp_path / "shards" / "000001-a1" / "zarr.json").unlink()
    with pytest.raises(DamagedCacheError, match=r"000001-a1/zarr\.json: missing or of another size"):
        seal(files)
    assert not files.exists("seal.json")


def test_seal_needs_a_cache(tmp_path):
    with pytest.raises(InputNotFoundError, match="no cache at"):
        seal(LocalFiles(tmp_path))


def test_a_damaged_shard_is_made_anew(tmp_path, manifest):
    """The next step that errors name: repair deletes the shard's index, and the job writes the shard again."""
    files = make_cache(tmp_path, manifest)
    (tmp_path / "shards" / "000001-a1" / "vision_ids_low" / "c" / "0" / "0").unlink()
    with pytest.raises(DamagedCacheError, match=r"with --repair: it rewrites only the damaged shards"):
        Cache.open(tmp_path).record(2)
    assert withdraw(files, verify(tmp_path), manifest, TOKENIZER_JSON) == [1]
    assert missing_shards(files, manifest) == [1]
    commit_shard(files, write_shard(files, 1, "again", make_rows(manifest, 1), manifest))
    seal(files)
    assert verify(tmp_path) == []
    assert "shards/000001-a1" in files.folders("shards"), "what is not read is removed only when asked for"
    assert delete_lost_attempts(files) == ["shards/000001-a1"]
    assert files.folders("shards") == ["shards/000000-a0", "shards/000001-again", "shards/000002-a2"]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), FileExistsError(17, "File exists")])
@pytest.mark.parametrize("lost", [True, False])
def test_a_folder_that_vanishes_while_it_is_written(files, manifest, monkeypatch, error, lost):
    """--clean deletes the folder of an attempt that has lost, which is fine; otherwise it is an error. (mkdir may also
    find a folder that is deleted right afterwards.)"""
    if lost:
        assert commit_shard(files, write_shard(files, 0, "won", make_rows(manifest, 0), manifest))
    plain, written = LocalFiles.write, []

    def write(self, name, data):
        if len(written) == 2:
            raise error
        written.append(name)
        plain(self, name, data)

    monkeypatch.setattr(LocalFiles, "write", write)
    if lost:
        assert not commit_shard(files, write_shard(files, 0, "late", make_rows(manifest, 0), manifest))
    else:
        with pytest.raises(OSError, match=error.strerror):
            write_shard(files, 0, "late", make_rows(manifest, 0), manifest)
    assert files.folders("shards") == (["shards/000000-won"] if lost else [])
