"""Any damage to any object of any cache is found before any of its numbers is used, listed, and repaired.

An object is changed in one bit, cut, emptied, removed, swapped with another object of the cache, or replaced by the
object of the same name in a cache of the same settings and other numbers. The same 300 examples in every run, which take
about half a minute.
"""

import random
import shutil
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emkd.errors import CacheIncompleteError, CacheVersionError, DamagedCacheError
from emkd.storage.cache import Cache, verify
from emkd.storage.index.commit import read_index
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import committed_shards, index_name
from tests.storage.builders import TOKENIZER_JSON, make_cache
from tests.storage.lifecycle.killed import CONTENTS, MANIFEST, capture, record_digest, records, row_of_data, run_extend

pytestmark = pytest.mark.slow
STATES = ("sealed", "unsealed", "extended", "extending")
HOW = ("flip", "flip", "cut", "empty", "remove", "swap", "foreign")
NEWEST = {"sealed": "seal.json", "extended": "extensions/000001/seal.json"}
OLD = {
    "extended": ("seal.json", "index.parquet"),
    "extending": ("seal.json", "index.parquet"),
}  # superseded: never read


def build(folder, state, seed=0):
    make_cache(folder, MANIFEST, contents=CONTENTS[0], sealed=state != "unsealed", seed=seed)
    if state.startswith("exten"):
        run_extend(str(folder))
    if state == "extending":
        (folder / "extensions/000001/seal.json").unlink()
        (folder / "extensions/000001/index.parquet").unlink()


class Built:
    """A cache as it was written: names of its objects, hashes of its records by row, attempts by shard."""

    def __init__(self, folder):
        files = LocalFiles(folder)
        self.folder, self.names = folder, files.names()
        self.records = records(Cache.open(folder, partial=True))
        self.attempts = {shard: read_index(files, shard).attempt for shard in committed_shards(files)}


@pytest.fixture(scope="module")
def caches(many_caches):
    found = {}
    for state in STATES:
        folder = many_caches / state
        build(folder, state)
        build(many_caches / f"other-{state}", state, seed=1)
        found[state] = Built(folder)
    return found


def damage(folder, other, name, how, seed, second):
    """Damage a cache. Returns the names of the objects that changed."""
    before = {n: (folder / n).read_bytes() for n in (name, second)}
    path, original = folder / name, before[name]
    draw = random.Random(seed)
    if how == "flip" and original:
        bit = draw.randrange(8 * len(original))
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
    elif how == "cut":
        path.write_bytes(original[: draw.randrange(len(original))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "remove":
        path.unlink()
    elif how == "swap":
        path.write_bytes(before[second])
        (folder / second).write_bytes(original)
    elif how == "foreign" and (other / name).exists():
        path.write_bytes((other / name).read_bytes())
    return {n for n, data in before.items() if not (folder / n).exists() or (folder / n).read_bytes() != data}


def shard_of(name):
    """The shard that an object belongs to, by its name; None for objects of the whole cache."""
    room, _, rest = name.partition("/")
    return int(rest[:6]) if room in ("shards", "index") else None


def reads(folder, partial):
    """({row: hash of the record, or the error}, error of opening)."""
    try:
        cache = Cache.open(folder, partial=partial, window=1)
    except (DamagedCacheError, CacheVersionError, CacheIncompleteError) as error:
        return {}, error
    found = {}
    for i in range(len(cache)):
        try:
            found[row_of_data(cache, i)] = record_digest(cache, i)
        except DamagedCacheError as error:
            found[row_of_data(cache, i)] = error
    return found, None


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    state=st.sampled_from(STATES),
    room=st.sampled_from(["shards", "index", "", "", "extensions"]),
    how=st.sampled_from(HOW),
    pick=st.integers(0, 2**32),
    seed=st.integers(0, 2**32),
)
def test_any_damage(caches, many_caches, state, room, how, pick, seed):
    built = caches[state]
    names, expected = built.names, built.records
    rooms = [name for name in names if name.startswith(room + "/" if room else "") and (room or "/" not in name)]
    name = rooms[pick % len(rooms)] if rooms else names[pick % len(names)]
    second = names[seed % len(names)]
    folder = shutil.copytree(built.folder, many_caches / uuid.uuid4().hex)
    try:
        damaged = damage(folder, many_caches / f"other-{state}", name, how, seed, second)
        check_reads(folder, state, how, damaged, expected)
        check_verify_and_repair(folder, state, how, damaged, expected, built.attempts)
    finally:
        shutil.rmtree(folder)


def check_reads(folder, state, how, damaged, expected):
    used = damaged - set(OLD.get(state, ()))
    shards = {shard_of(name) for name in used}
    for partial in (True, False) if NEWEST.get(state) in used else (True,):
        found, error = reads(folder, partial)
        if error is not None:
            assert used, f"nothing that is read was changed, but: {error}"
            assert isinstance(error, CacheIncompleteError) or any(name in str(error) for name in used), error
        for row, result in found.items():
            if isinstance(result, DamagedCacheError):
                assert any(f"{shard:06d}" in str(result) for shard in shards - {None}), result
            elif not (how == "foreign" and state not in NEWEST):
                assert result == expected[row], f"{row}: another number than the one that was written"
        if state in NEWEST and used and NEWEST[state] not in used:
            assert error is not None or all_raise(found, folder, shards - {None}), "damage was not noticed"


def all_raise(found, folder, shards):
    cache = Cache.open(folder)
    numbers = [i for shard in shards for i in cache.samples_of_shard(shard)]
    return bool(shards) and all(isinstance(found[row_of_data(cache, i)], DamagedCacheError) for i in numbers)


def check_verify_and_repair(folder, state, how, damaged, expected, attempts):
    files, used = LocalFiles(folder), damaged - set(OLD.get(state, ()))
    try:
        listed = verify(folder)
    except CacheVersionError:
        assert "manifest.json" in damaged
        return
    found = {item.name for item in listed}
    assert len(found) == len(listed), "listed once"
    # Without the index of a shard, damage to its objects cannot be seen: repairing the index writes them again.
    known = {n for n in used if not n.startswith("shards/") or index_name(shard_of(n)) not in used}
    if state in NEWEST and NEWEST[state] not in used:
        assert known <= found <= used
    else:
        assert {name for name in known if name.startswith("shards/")} <= found
        assert found <= used | objects_of(files, used), "without a seal, unused bytes have no hash"
    before = {name: files.read(name) for name in files.names()}
    if any(name.endswith("plan.json") for name in found):
        with pytest.raises(DamagedCacheError, match="cannot be rebuilt"):
            withdraw(files, listed, MANIFEST, TOKENIZER_JSON)
        assert {name: files.read(name) for name in files.names()} == before, "nothing was changed"
        return
    again = set(withdraw(files, listed, MANIFEST, TOKENIZER_JSON)) | (attempts.keys() - set(committed_shards(files)))
    capture(str(folder))
    assert verify(folder) == []
    cache = Cache.open(folder)
    assert records(cache) == expected
    assert again == {n for n in cache.shards if read_index(files, n).attempt != attempts[n]}, "only the damaged ones"
    assert again <= {shard_of(name) for name in used}


def objects_of(files, names):
    """The objects of shards whose index is intact in itself, but has other hashes: they are listed, not the index."""
    shards = [
        shard_of(name) for name in names if name.startswith("index/") and files.exists(index_name(shard_of(name)))
    ]
    return {name for name in files.names("shards") if shard_of(name) in shards}
