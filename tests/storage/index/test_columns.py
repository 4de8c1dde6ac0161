"""The rows of all shards in a reader's memory: the same as the table on disk, decoded on first use."""

import json
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emkd.errors import DamagedCacheError, SampleNotFoundError, UsageError
from emkd.storage.cache import Cache
from emkd.storage.index.columns import Rows, as_numpy, prefix_range, text_scalar
from emkd.storage.index.commit import read_index
from emkd.storage.index.find import MIN_PREFIX, find_sample
from emkd.storage.index.table import FIRST_SCHEMA, INDEX_SCHEMA, OK, SKIPPED, TEXT_COLUMN, read_parquet, write_parquet
from emkd.storage.objects.digest import ObjectDigest, seal_envelope

# Few letters, some of more than one byte, so that ids, keys and their beginnings often agree.
texts = st.text("ab\x00é", max_size=11)


def table_of(keys, ids=None, skipped=()):
    rows = [
        {name: 0 for name in INDEX_SCHEMA.names}
        | {"id": name, "key": key, TEXT_COLUMN: "", "images": [], "retained_mass": None, "detail": "odd"}
        | {"row": position, "reason": "why", "status": SKIPPED if position in skipped else OK}
        for position, (key, name) in enumerate(zip(keys, ids or [""] * len(keys), strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


@settings(deadline=None)
@given(keys=st.lists(texts, max_size=9), cut=st.integers(0, 9))
def test_the_first_bytes_of_keys(keys, cut):
    expected = [int.from_bytes(key.encode()[:8].ljust(8, b"\0")) for key in keys]
    whole = Rows.of(table_of(keys))
    assert whole.key_prefixes.tolist() == expected
    columns = {"key": pa.chunked_array([pa.array(keys, pa.string())[:cut], pa.array(keys, pa.string())[cut:]])}
    assert Rows(columns, len(keys), None).key_prefixes.tolist() == expected
    for key in keys:
        for n in range(len(key) + 1):
            low, high = prefix_range(key[:n])
            assert low <= expected[keys.index(key)] <= high


def naive(keys, ids, skipped, wanted):
    """The number of the sample, "several", "skipped", or None: one pass over the samples for key, id and prefix each."""
    samples = [position for position in range(len(keys)) if position not in skipped]
    for position in samples:
        if wanted and keys[position] == wanted:
            return samples.index(position)
    with_id = [position for position in samples if wanted and ids[position] == wanted]
    if with_id:
        return "several" if len(with_id) > 1 else samples.index(with_id[0])
    begins = [position for position in samples if len(wanted) >= MIN_PREFIX and keys[position].startswith(wanted)]
    if begins:
        return "several" if len({keys[position] for position in begins}) > 1 else samples.index(begins[0])
    return "skipped" if any(wanted and wanted in (keys[position], ids[position]) for position in skipped) else None


@settings(deadline=None)
@given(data=st.data(), keys=st.lists(texts, min_size=1, max_size=8))
def test_searching_finds_what_one_pass_over_the_rows_finds(data, keys):
    ids = data.draw(st.lists(texts, min_size=len(keys), max_size=len(keys)))
    skipped = data.draw(st.sets(st.integers(0, len(keys) - 1)))
    known = st.sampled_from([*keys, *ids])
    wanted = data.draw(known | st.builds(lambda text, n: text[:n], known, st.integers(0, 9)))
    expected, rows = naive(keys, ids, skipped, wanted), Rows.of(table_of(keys, ids, skipped))
    if expected == "several":
        with pytest.raises(UsageError, match="name one by its key"):
            find_sample(rows, wanted, "here")
    elif expected in ("skipped", None):
        with pytest.raises(SampleNotFoundError, match="was skipped: why: odd" if expected else "no sample has the key"):
            find_sample(rows, wanted, "here")
    else:
        assert find_sample(rows, wanted, "here") == expected


def test_a_search_for_what_is_no_text(cache_folder):
    """A shell may pass text that is not UTF-8."""
    with pytest.raises(SampleNotFoundError, match="no sample has the key or id"):
        Cache.open(cache_folder).find("id-4\udcff")


def test_columns_are_decoded_when_they_are_asked_for(cache_folder):
    data = (cache_folder / "index.parquet").read_bytes()
    whole, rows = read_parquet("index.parquet", data), Rows.read("index.parquet", data)
    assert len(rows) == len(whole) == 5
    assert sorted(rows._columns) == ["id", "key", "shard", "status"]
    assert rows["images"].equals(whole["images"])
    assert rows.numbers("row").tolist() == [0, 1, 2, 3, 4]
    assert sorted(rows._columns) == ["id", "images", "key", "row", "shard", "status"]
    other = pickle.loads(pickle.dumps(rows))  # noqa: S301 (what a data loader does)
    for one in (rows, other):
        assert one.table().equals(whole)
        assert one._parquet is None, "of what is decoded, the bytes are not kept"
    assert rows.table(1, 3).equals(whole.slice(1, 2))
    assert rows.of_shard(1)["row"].to_pylist() == [2, 3]
    assert len(rows.of_shard(7)) == 0
    assert rows.skipped(("row", "reason")).to_pylist() == [{"row": 3, "reason": "no_answer"}]
    with pytest.raises(KeyError, match="expected columns of"):
        rows["nothing"]


def test_an_index_of_an_older_version_has_a_column_of_nulls(cache_folder):
    table = Cache.open(cache_folder).rows.table()
    data = write_parquet(pa.Table.from_pylist(table.to_pylist(), schema=FIRST_SCHEMA))
    rows = Rows.read("index.parquet", data)
    assert rows[TEXT_COLUMN].null_count == 5
    assert rows.table().drop_columns([TEXT_COLUMN]).equals(table.drop_columns([TEXT_COLUMN]))


def test_what_is_no_index_is_refused(cache_folder):
    data = (cache_folder / "index.parquet").read_bytes()
    for broken in (b"", data[:-9], b"x" * 100):
        with pytest.raises(DamagedCacheError, match=r"here: not a readable Parquet file"):
            Rows.read("here", broken)
    odd = write_parquet(Cache.open(cache_folder).rows.table().drop_columns(["status"]))
    with pytest.raises(DamagedCacheError, match="here: its columns are not the columns of an index"):
        Rows.read("here", odd)


def test_a_column_that_cannot_be_decoded_is_damage(cache_folder):
    """Here no hash was compared; opening a sealed cache compares it first."""
    data = bytearray((cache_folder / "index.parquet").read_bytes())
    meta = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0)
    columns = [meta.column(i) for i in range(meta.num_columns)]
    (start,) = (c.data_page_offset for c in columns if c.path_in_schema == "retained_mass")
    data[start : start + 40] = random.Random(0).randbytes(40)
    rows = Rows.read("here", bytes(data))
    with pytest.raises(DamagedCacheError, match="here: not a readable Parquet file"):
        rows["retained_mass"]


def test_numbers_without_a_copy(cache_folder):
    rows = Cache.open(cache_folder).rows
    assert as_numpy(pa.chunked_array([], pa.int64())).tolist() == []
    assert as_numpy(pa.chunked_array([[1, 2], [3]])).tolist() == [1, 2, 3]
    assert np.shares_memory(rows.numbers("shard"), rows.numbers("shard"))
    assert text_scalar("é").as_py() == "é"


def test_neither_opening_nor_searching_nor_inspecting_imports_pandas(cache_folder):
    """Arrow does when it first converts a value, which takes longer than all of these."""
    code = (
        "import sys\nfrom emkd.inspection import inspect_cache, render\nfrom emkd.storage.cache import Cache\n"
        f"Cache.open({str(cache_folder)!r}).find('id-4')\nrender(inspect_cache({str(cache_folder)!r}))\n"
        "print([name for name in ('pandas', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def with_another(table, name):
    """The table with another value in the last row of a column."""
    field, values = INDEX_SCHEMA.field(name), table[name].to_pylist()
    values[-1] = 0.5 if name == "retained_mass" else 7 if pa.types.is_integer(field.type) else "another"
    return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


CHANGED = ["id", "text_sha256", "reason", "detail", "vision_count", "retained_mass"]


@pytest.mark.parametrize("name", CHANGED)
def test_a_shard_that_was_made_anew_since_the_cache_was_opened_is_refused(cache_folder, tmp_path, name):
    """Its rows have changed, so the rows in memory are out of date."""
    shutil.copytree(cache_folder, tmp_path / "cache")
    (tmp_path / "cache" / "seal.json").unlink()
    cache = Cache.open(tmp_path / "cache", partial=True)
    assert [len(cache.read_shard(shard)) for shard in cache.shards] == [2, 1, 1]
    index = read_index(cache.files, 1)
    path = tmp_path / "cache" / "index" / "000001.parquet"
    path.write_bytes(replace(index, table=with_another(index.table, name)).to_bytes())
    with pytest.raises(
        DamagedCacheError,
        match=r"000001\.parquet: its rows (have changed since the cache was opened: the shard|contradict each other)",
    ):
        cache.read_shard(1)
    assert len(cache.read_shard(2)) == 1
    path.write_bytes(index.to_bytes())
    assert len(cache.read_shard(1)) == 1


@pytest.mark.parametrize("name", CHANGED)
def test_a_consolidated_index_of_other_rows_than_the_shards_is_refused(cache_folder, tmp_path, name):
    """Although the seal has the hashes of both."""
    shutil.copytree(cache_folder, tmp_path / "cache")
    path, where = tmp_path / "cache" / "index.parquet", tmp_path / "cache" / "seal.json"
    path.write_bytes(write_parquet(with_another(read_parquet("", path.read_bytes()), name)))
    body = json.loads(where.read_text())["body"]
    body["objects"]["index.parquet"] = ObjectDigest.of(path.read_bytes()).to_json()
    where.write_text(json.dumps(seal_envelope(body)))
    cache = Cache.open(tmp_path / "cache")
    assert len(cache.read_shard(0)) == 2
    with pytest.raises(DamagedCacheError, match=r"000002\.parquet: its rows have changed since the cache was opened"):
        cache.read_shard(2)


def test_a_sealed_shard_that_was_made_anew_is_not_the_one_of_the_seal(cache_folder, tmp_path):
    shutil.copytree(cache_folder, tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    index = replace(read_index(cache.files, 1), attempt="another")
    (tmp_path / "cache" / "index" / "000001.parquet").write_bytes(index.to_bytes())
    with pytest.raises(DamagedCacheError, match=r"000001\.parquet: .*expected"):
        cache.read_shard(1)
