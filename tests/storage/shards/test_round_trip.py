"""Random shards are read as they were written, with emkd and with plain Zarr."""

import tempfile
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from emkd.errors import OutputExistsError, SampleNotFoundError
from emkd.storage.arrays.layout import ArrayLayout
from emkd.storage.cache import Cache, create_cache
from emkd.storage.index.commit import commit_shard
from emkd.storage.index.rows import retained_mass
from emkd.storage.lifecycle.seal import seal
from emkd.storage.record import CapturedRow, RowHint
from emkd.storage.shards.buffers import Buffers
from emkd.storage.shards.reader import ChunkedArray
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import (
    TOKENIZER_JSON,
    V,
    array_fields,
    changed,
    make_cache,
    make_manifest,
    make_record,
    make_rows,
    row_of,
)

ROW_SHAPES = st.one_of(
    st.none(),  # a skipped row
    st.fixed_dictionaries(
        {
            "n_text": st.integers(0, 9),
            "image_sizes": st.lists(st.integers(0, 7), max_size=3).map(tuple),  # () is a text-only sample
            "n_answer": st.integers(0, 3),
        }
    ),
)


def random_rows(manifest, shapes, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for row, shape in enumerate(shapes):
        if shape is None:
            rows.append(CapturedRow(hint=RowHint(row=row, id=""), key="", record=None, reason="unreadable"))
        else:
            rows.append(row_of(make_record(rng, manifest, **shape), row))
    return rows


def assert_same(read, written, logits, affinity):
    """Records equal in everything but what the precision of the affinity allows.

    Builders round their logits first, as the teacher's pass does, so that these come back exactly.
    """
    assert (read.key, read.images) == (written.key, written.images)
    for name, expected in array_fields(written).items():
        found = array_fields(read)[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        if name != "affinity" or affinity == "float32":
            np.testing.assert_array_equal(found, expected, err_msg=name)
    atol = {"int8": 1 / 254 + 1e-7, "float16": 2.0**-11, "float32": 0}[affinity]
    np.testing.assert_allclose(read.affinity, written.affinity, rtol=0, atol=atol)


def assert_own_memory(record, shard):
    """The arrays of a shard are reused for the next one: a record that is a view of them would change."""
    for name, values in array_fields(record).items():
        assert not any(np.shares_memory(values, array.chunks) for array in shard.arrays.values()), name


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("affinity", ["int8", "float16", "float32"])
@pytest.mark.parametrize("logits", ["bfloat16", "float16", "float32", "step0.2"])
@given(
    shapes=st.lists(ROW_SHAPES, min_size=1, max_size=5),
    top_k=st.sampled_from([1, 4, V]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=6, deadline=None)
def test_round_trip(logits, affinity, compression, shapes, top_k, seed):
    n = len(shapes)
    manifest = make_manifest(
        n_rows=n,
        rows_per_shard=n,
        top_k=top_k,
        answer_top_k=min(top_k, 3),
        logits=logits,
        affinity=affinity,
        compression=compression,
    )
    rows = random_rows(manifest, shapes, seed)
    with tempfile.TemporaryDirectory() as folder:
        files = create_cache(folder, manifest, TOKENIZER_JSON)
        assert commit_shard(files, write_shard(files, 0, "a", rows, manifest))
        seal(files)
        cache = Cache.open(folder)
        kept = [row for row in rows if row.record is not None]
        assert cache.n_samples == len(kept)
        assert cache.skipped["row"].to_pylist() == [row.hint.row for row in rows if row.record is None]
        shard = cache.read_shard(0)
        for i, row in enumerate(kept):
            assert_same(cache.record(i), row.record, logits, affinity)
            assert_own_memory(shard.record(i), shard)
            info = cache.sample_info(i)
            assert (info.row, info.key, info.n_vision) == (row.hint.row, row.key, len(row.record.vision.ids))
            assert info.retained_mass == retained_mass(row.record)


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11), ("float32", 0)])
def test_logits_that_were_not_rounded_before(tmp_path, precision, bound):
    """They are rounded when written; of logits that rounding makes equal, the smaller id comes first."""
    exact = make_manifest(n_rows=1, rows_per_shard=1, logits="float32", top_k=V)
    record = make_record(np.random.default_rng(0), exact, image_sizes=(300,))
    manifest = make_manifest(n_rows=1, rows_per_shard=1, logits=precision, top_k=V)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    commit_shard(files, write_shard(files, 0, "a", [row_of(record, 0)], manifest))
    read = Cache.open(tmp_path, partial=True).record(0)
    for ids, logits, stored_ids, stored in zip(
        record.vision.ids, record.vision.logits, read.vision.ids, read.vision.logits, strict=True
    ):
        before, after = np.empty(V), np.empty(V)
        before[ids], after[stored_ids] = logits, stored
        assert (np.abs(before - after) <= bound * np.abs(before)).all()
        assert list(zip(-stored, stored_ids, strict=True)) == sorted(zip(-stored, stored_ids, strict=True))
    if precision == "bfloat16":
        assert (read.vision.ids != record.vision.ids).any()  # there were such ties


def test_plain_zarr_opens_a_shard(tmp_path):
    manifest = make_manifest()
    files = make_cache(tmp_path, manifest)
    group = zarr.open_group(tmp_path / "shards" / "000000-a0", mode="r")
    records = [row.record for row in make_rows(manifest, 0)]
    assert dict(group.attrs)["format"] == "emkd shard"
    assert group.attrs["rows"] == [0, 2]
    for name in ("text_ids", "vision_tail_logsumexp", "vision_tail_mean", "answer_positions"):
        expected = np.concatenate([array_fields(record)[name] for record in records])
        np.testing.assert_array_equal(group[name][...], expected)
    ids = np.concatenate([record.vision.ids for record in records])
    np.testing.assert_array_equal(group["vision_ids_low"][...], ids)
    ranks = group["vision_logits"]
    assert (ranks.dtype, ranks.attrs["precision"], ranks.shape) == (np.uint16, "bfloat16", ids.shape[::-1])
    assert ranks.metadata.dimension_names == ("rank", "vision_token")
    assert len(group) == 10
    names = {name.removeprefix("shards/000000-a0/") for name in files.names("shards/000000-a0")}
    assert all(name == "zarr.json" or name.split("/")[0] in group for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("vocabulary", [65_536, 65_537, 151_936])
def test_every_array_is_what_zarr_reads(tmp_path, compression, vocabulary):
    """Several chunks, the last one padded; ids above 65,536 have a second array."""
    manifest = make_manifest(n_rows=1, rows_per_shard=1, top_k=2, compression=compression, n_tokens=vocabulary)
    record = make_record(np.random.default_rng(0), make_manifest(top_k=2), n_text=2, image_sizes=(20_000,))
    ids = np.sort(np.random.default_rng(1).integers(0, vocabulary, (20_000, 2)).astype(np.int32))
    row = row_of(record, 0, vision_ids=ids)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    index = write_shard(files, 0, "a", [row], manifest)
    commit_shard(files, index)
    shard = Cache.open(tmp_path, partial=True).read_shard(0)
    group = zarr.open_group(tmp_path / index.prefix, mode="r")
    assert set(group.array_keys()) == shard.arrays.keys()
    assert ("vision_ids_high" in shard.arrays) == (vocabulary > 65_536)
    for name, array in group.arrays():
        decoded = shard.arrays[name]
        np.testing.assert_array_equal(array[...], decoded.take([(0, array.shape[decoded.layout.token_axis])]))
    assert group["vision_logits"].chunks == ((2, 16_384) if compression == "zstd" else (16_384, 2))
    assert_same(shard.record(0), row.record, "bfloat16", "int8")


def test_the_same_rows_make_the_same_objects(tmp_path):
    manifest = make_manifest()
    first, second = make_cache(tmp_path / "1", manifest), make_cache(tmp_path / "2", manifest)
    assert first.names() == second.names()
    for name in first.names():
        assert first.read(name) == second.read(name), name


def test_chunks_of_zeros_are_objects_too(tmp_path):
    manifest = make_manifest(n_rows=1, rows_per_shard=1, top_k=1)
    record = make_record(np.random.default_rng(0), manifest, n_text=1, image_sizes=(20_000,), n_answer=0)
    zeros = {
        "vision_ids": np.zeros((20_000, 1), np.int32),
        "vision_logits": np.zeros((20_000, 1), np.float32),
        "affinity": np.zeros((1, 20_000), np.float32),
    }
    row = row_of(record, 0, **zeros)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    index = write_shard(files, 0, "a", [row], manifest)
    assert {
        "vision_ids_low/c/0/0",
        "vision_ids_low/c/1/0",
        "vision_logits/c/0/1",
        "affinity/c/0",
    } <= index.objects.keys()
    commit_shard(files, index)
    assert_same(Cache.open(tmp_path, partial=True).record(0), row.record, "bfloat16", "int8")


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), size=st.integers(1, 50), by_rank=st.booleans())
def test_chunks_have_every_token_once(lengths, size, by_rank):
    layout = ArrayLayout(name="x", axis="vision", dtype=np.dtype("u2"), width=3, by_rank=by_rank)
    whole = np.arange(3 * sum(lengths), dtype="u2").reshape(layout.shape(sum(lengths)))
    chunks = np.zeros((-(-sum(lengths) // size), *layout.shape(size)), "u2")
    for token in range(sum(lengths)):
        place = (token // size, slice(None), token % size) if by_rank else divmod(token, size)
        chunks[place] = whole[:, token] if by_rank else whole[token]
    array = ChunkedArray(layout=layout, chunks=chunks)
    for first in range(0, sum(lengths), 7):
        for last in (first, first + 1, sum(lengths)):
            expected = whole[:, first:last] if by_rank else whole[first:last]
            np.testing.assert_array_equal(array.take([(first, last)]), expected)
    ends = [(0, sum(lengths) // 2), (0, sum(lengths))]
    joined = [whole[:, a:b] if by_rank else whole[a:b] for a, b in ends]
    np.testing.assert_array_equal(array.take(ends), np.concatenate(joined, axis=layout.token_axis))


def test_a_shard_gives_records_by_place(cache_folder):
    cache = Cache.open(cache_folder)
    shard = cache.read_shard(0)
    assert len(shard) == 2
    assert shard.n_bytes > 0
    assert shard.record(1).key == cache.sample_info(1).key
    with pytest.raises(SampleNotFoundError, match="sample 2 of shard 0: it has 2 samples"):
        shard.record(2)


def test_retained_mass_is_that_of_the_full_softmax():
    manifest = make_manifest(top_k=5, logits="float32")
    rng = np.random.default_rng(3)
    full = rng.normal(0, 3, (4, V))
    probabilities = np.exp(full) / np.exp(full).sum(axis=1, keepdims=True)
    expected = np.sort(probabilities, axis=1)[:, -5:].sum(axis=1).mean()
    order = np.argsort(-full, axis=1)
    record = make_record(rng, manifest, image_sizes=(4,))
    tail = np.log(np.exp(np.take_along_axis(full, order[:, 5:], 1)).sum(axis=1))
    record = changed(
        record,
        vision_logits=np.take_along_axis(full, order[:, :5], 1).astype(np.float32),
        vision_tail_logsumexp=tail.astype(np.float32),
    )
    assert retained_mass(record) == pytest.approx(expected, rel=1e-6)
    assert retained_mass(make_record(rng, manifest, image_sizes=())) is None
    everything = make_record(rng, make_manifest(top_k=V))
    assert retained_mass(everything) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_ids": np.zeros((5, 3), np.int32)}, r"vision\.ids has shape \(5, 3\), expected \(5, 4\)"),
        ({"text_ids": np.zeros(6, np.int64)}, "text_ids is int64, expected int32"),
        ({"vision_ids": np.full((5, 4), V, np.int32)}, "vision.ids from 40 to 40, expected 0 to 39"),
        ({"vision_logits": np.arange(20, dtype=np.float32).reshape(5, 4)}, "not in descending order"),
        ({"vision_logits": np.full((5, 4), np.nan, np.float32)}, "largest of a token is not finite"),
        ({"vision_tail_mean": np.full(5, np.inf, np.float32)}, "vision.tail_mean: not finite"),
        ({"vision_tail_logsumexp": np.full(5, np.nan, np.float32)}, "vision.tail_logsumexp: not finite"),
        ({"affinity": np.full((6, 5), 2, np.float32)}, "expected cosines"),
        ({"answer_positions": np.array([1, 6], np.int32)}, "answer_positions from 1 to 6, expected 0 to 5"),
        ({"images": ()}, "its images have 0 vision tokens, its logits 5"),
        ({"key": "other"}, "its record has the key 'other'"),
    ],
)
def test_malformed_records_are_refused_before_anything_is_written(tmp_path, changes, message):
    manifest = make_manifest(n_rows=1, rows_per_shard=1)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    row = row_of(make_record(np.random.default_rng(0), manifest), 0, **changes)
    with pytest.raises(ValueError, match=message):
        write_shard(files, 0, "a", [row], manifest)
    assert files.names("shards") == []


def test_only_the_rows_of_the_plan_make_a_shard(tmp_path):
    manifest = make_manifest()
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    rows = make_rows(manifest, 0)
    with pytest.raises(ValueError, match="its rows in the plan are 0 to 1 in order, got 1 rows"):
        write_shard(files, 0, "a", rows[:1], manifest)
    with pytest.raises(ValueError, match="its rows in the plan are 2 to 3"):
        write_shard(files, 1, "a", rows, manifest)
    with pytest.raises(ValueError, match="a skipped row needs a reason"):
        write_shard(files, 0, "a", [rows[0], replace(rows[1], record=None)], manifest)
    with pytest.raises(ValueError, match="attempt 'a/b'; expected letters"):
        write_shard(files, 0, "a/b", rows, manifest)
    write_shard(files, 0, "a", rows, manifest)
    with pytest.raises(OutputExistsError, match="give each attempt its own name"):
        write_shard(files, 0, "a", rows, manifest)


def test_memory_is_used_again_where_it_fits():
    buffers, dtype = Buffers(), np.dtype(np.int32)
    large, small = buffers.empty((5, 20), dtype), buffers.empty((60,), dtype)
    assert (large.shape, small.shape, large.dtype) == ((5, 20), (60,), dtype)
    assert not np.shares_memory(large, small)
    memory = {array.__array_interface__["data"][0] for array in (large, small)}
    buffers.give_back(large)
    buffers.give_back(small)
    again = [buffers.empty((2, 29), dtype), buffers.empty((90,), dtype)]
    assert [array.__array_interface__["data"][0] for array in again] == [
        array.__array_interface__["data"][0] for array in (small, large)
    ]
    for array in again:
        buffers.give_back(array)
    others = [buffers.empty((20,), dtype), buffers.empty((101,), dtype)]  # too small for theirs, and too large
    assert not memory & {array.__array_interface__["data"][0] for array in others}
    with pytest.raises(ValueError, match="did not come from empty"):
        buffers.give_back(np.empty(3))
