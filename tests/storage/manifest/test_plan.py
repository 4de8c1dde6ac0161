"""Plans of extensions, compared with a naive plan that looks at every row."""

import time
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from emkd.storage.index.commit import ShardIndex
from emkd.storage.lifecycle.extend import plan_extension
from emkd.storage.manifest.plan import Extension, FoundRows, as_ranges
from tests.storage.builders import make_manifest, with_data

N_DATA = 12
CONTENT = st.one_of(st.none(), st.integers(0, 15))  # None is a row that cannot be read; contents repeat
RUN = st.tuples(
    st.sampled_from(["a" * 64, "b" * 64, "c" * 64]), st.integers(1, N_DATA), st.integers(1, 4)
)  # fingerprint, limit, rows per shard


def as_manifest(run):
    fingerprint, limit, rows_per_shard = run
    return with_data(make_manifest(), fingerprint, N_DATA, limit=limit, rows_per_shard=rows_per_shard)


def key_of(content):
    return None if content is None else f"key-{content}"


def index_of(manifest, shard, data):
    """The index of a shard. Unreadable rows have an empty key."""
    contents = data[manifest.datasets[manifest.source(shard)].fingerprint]
    rows = list(manifest.rows(shard))
    table = pa.table({"row": rows, "key": [key_of(contents[row]) or "" for row in rows]})
    return ShardIndex(shard=shard, attempt="a", settings_sha256="", objects={}, table=table)


def naive_rows(cache, kept, row, run, data):
    """All (dataset, row) of the cache that are a row of `run`: the same row of the same files, or else the same key."""
    key = key_of(data[run.dataset.fingerprint][row])
    cached = [(cache.source(shard), r) for shard in kept for r in cache.rows(shard)]
    fingerprint = run.dataset.fingerprint
    same_row = [(s, r) for s, r in cached if cache.datasets[s].fingerprint == fingerprint and r == row]
    others = [(s, r) for s, r in cached if cache.datasets[s].fingerprint != fingerprint]
    same_key = [(s, r) for s, r in others if key and key_of(data[cache.datasets[s].fingerprint][r]) == key]
    return same_row or same_key


@settings(max_examples=200, deadline=None)
@given(
    data=st.fixed_dictionaries({f * 64: st.lists(CONTENT, min_size=N_DATA, max_size=N_DATA) for f in "abc"}),
    first=RUN,
    runs=st.lists(RUN, min_size=1, max_size=3),
    chance=st.randoms(use_true_random=False),
)
def test_every_row_is_found_or_added_once(data, first, runs, chance):
    cache = as_manifest(first)
    used = set(cache.shards)
    for run in map(as_manifest, runs):
        kept = [shard for shard in cache.shards if chance.random() < 0.7]
        contents = data[run.dataset.fingerprint]
        keyed = [(row, key_of(content)) for row, content in enumerate(contents)]
        extension = plan_extension(cache, [index_of(cache, n, data) for n in kept], run, lambda rows=keyed: rows)

        found = {f.row + i: (f.source, f.source_row + i) for f in extension.found for i in range(f.count)}
        expected = {row: naive_rows(cache, kept, row, run, data) for row in range(run.plan.n_rows)}
        assert found.keys() == {row for row, rows in expected.items() if rows}
        assert all(cached in expected[row] for row, cached in found.items())
        added = [row for row in range(run.plan.n_rows) if row not in found]
        n = run.plan.rows_per_shard
        assert [extension.rows_of(shard) for shard in extension.shards] == [
            added[i : i + n] for i in range(0, len(added), n)
        ]
        assert not used & set(extension.shards), "a number is never given twice, nor that of a shard that was dropped"
        used |= set(extension.shards)

        cache = cache.model_copy(update={"extensions": (*cache.extensions, extension)})
        assert cache.shards == (*kept, *extension.shards)
        assert Extension.model_validate_json(extension.model_dump_json()) == extension
        rows = [(cache.source(shard), row) for shard in cache.shards for row in cache.rows(shard)]
        assert len(rows) == len(set(rows)) == cache.n_rows
        assert {cache.shard_sha256(shard) for shard in extension.shards} <= {cache.plan_sha256}


@given(st.sets(st.integers(0, 40)))
def test_as_ranges(numbers):
    ranges = as_ranges(sorted(numbers))
    assert [n for first, last in ranges for n in range(first, last)] == sorted(numbers)
    assert all(a[1] < b[0] for a, b in pairwise(ranges)), "the fewest ranges"


def test_keys_are_read_only_where_they_are_needed():
    """Rows of the same files are found by row number; with another image root they may have other images."""
    run, more = as_manifest(("a" * 64, 4, 2)), as_manifest(("a" * 64, 7, 2))
    data = {"a" * 64: list(range(N_DATA))}
    kept = [index_of(run, shard, data) for shard in run.shards]

    def keyed_rows():
        asked.append(True)
        return [(row, key_of(content)) for row, content in enumerate([7, 8, 0, 9, 1, 10, 11])]

    asked = []
    extension = plan_extension(run, kept, more, keyed_rows)
    assert (extension.found, extension.rows, asked) == (
        (FoundRows(row=0, source=0, source_row=0, count=4),),
        ((4, 7),),
        [],
    )
    elsewhere = more.model_copy(update={"dataset": more.dataset.model_copy(update={"image_root": "/elsewhere"})})
    extension = plan_extension(run, kept, elsewhere, keyed_rows)
    assert [(f.row, f.source_row) for f in extension.found] == [(2, 0), (4, 1)]


def extension_of(**changes):
    values = {"number": 1, "parent_sha256": "", "dataset": make_manifest().dataset, "n_rows": 5, "kept": ((0, 2),)}
    return Extension(**values | {"first_shard": 3, "rows_per_shard": 2, "rows": ((0, 2), (3, 6))} | changes)


def test_rows_of_an_extension():
    extension = extension_of()
    assert extension.shards == range(3, 6)
    assert [extension.rows_of(shard) for shard in extension.shards] == [[0, 1], [3, 4], [5]]
    for shard in (2, 6):
        with pytest.raises(ValueError, match=f"shard {shard}: extension 1 adds shards"):
            extension.rows_of(shard)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_rows": 4}, "5 rows are added and 0 found, expected 4 together"),
        ({"rows": ((0, 6),), "n_rows": 6}, "n_rows is 6, the dataset has 5"),
        ({"kept": ((0, 4),)}, "exceed the first new shard, 3"),
    ],
)
def test_a_plan_that_contradicts_itself(changes, match):
    with pytest.raises(ValidationError, match=match):
        extension_of(**changes)


def test_a_changed_copy_has_another_hash():
    """Hashes and shards are computed once; a copy with other fields computes its own."""
    extension, manifest = extension_of(), make_manifest()
    assert (len(extension.plan_sha256), manifest.shards, len(manifest.settings_sha256)) == (64, (0, 1, 2), 64)
    assert extension.model_copy(update={"parent_sha256": "x"}).plan_sha256 != extension.plan_sha256
    assert extension.model_copy(update={"created_by": {"emkd": "9"}}).plan_sha256 == extension.plan_sha256
    assert manifest.model_copy(update={"top_k": 5}).settings_sha256 != manifest.settings_sha256
    assert manifest.model_copy(update={"extensions": (extension,)}).shards == (0, 1, 3, 4, 5)


def test_thousands_of_shards_and_of_ranges():
    """4,000 shards, 1,000 of them from 100,000 ranges: every method for every shard takes seconds."""
    manifest = with_data(make_manifest(), "a" * 64, 10**6, limit=300_000, rows_per_shard=100)
    ranges = tuple((3 * n, 3 * n + 1) for n in range(100_000))
    values = {"number": 1, "parent_sha256": manifest.settings_sha256, "dataset": manifest.dataset, "n_rows": 100_000}
    extension = Extension(**values, kept=((0, 3000),), first_shard=3000, rows_per_shard=100, rows=ranges)
    manifest = manifest.model_copy(update={"extensions": (extension,)})
    start = time.monotonic()
    asked = [(manifest.source(n), len(manifest.rows(n)), manifest.shard_sha256(n)) for n in manifest.shards]
    assert time.monotonic() - start < 5
    assert len(set(asked)) == 2
    assert (len(asked), manifest.n_rows) == (4000, 400_000)
