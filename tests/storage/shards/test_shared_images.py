"""Images that several samples share are stored once, and records are the same as without sharing."""

from dataclasses import replace

import numpy as np
import pytest

from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.seal import seal
from emkd.storage.shards.writer import ShardWriter, write_shard
from tests.storage.builders import TOKENIZER_JSON, array_fields, changed, make_manifest, make_record, row_of, with_image
from tests.storage.shards.test_round_trip import assert_same


def shared_rows(manifest):
    """The second image of row 0 is the first of row 1; row 2 has the images of row 0 in reverse order, row 3 its own."""
    rng = np.random.default_rng(0)
    a, b, c, d = (
        make_record(rng, manifest, image_sizes=sizes, n_text=4 + i)
        for i, sizes in enumerate(((5, 7), (7, 5), (7, 5), (5, 7)))
    )
    b = with_image(b, 0, a, 1)
    c = with_image(with_image(c, 0, a, 1), 1, a, 0)
    return [row_of(record, i) for i, record in enumerate((a, b, c, d))]


def written(folder, manifest, rows):
    files = create_cache(folder, manifest, TOKENIZER_JSON)
    index = write_shard(files, 0, "a", rows, manifest)
    assert commit_shard(files, index)
    seal(files)
    return Cache.open(folder), index


@pytest.mark.parametrize("logits", ["bfloat16", "float32"])
def test_they_are_there_once(tmp_path, logits):
    manifest = make_manifest(n_rows=4, rows_per_shard=4, logits=logits)
    rows = shared_rows(manifest)
    cache, index = written(tmp_path, manifest, rows)
    offsets = [[image["offset"] for image in row["images"]] for row in index.table.to_pylist()]
    assert offsets == [[0, 5], [5, 12], [5, 0], [17, 22]]
    assert index.table["vision_offset"].to_pylist() == [0, 5, 5, 17]
    assert verify(tmp_path) == []
    shard = cache.read_shard(0)
    assert len(shard.arrays["vision_tail_mean"].take([(0, 29)])) == 29
    for i, row in enumerate(rows):
        assert_same(cache.record(i), row.record, logits, manifest.affinity_precision)
    assert (cache.totals.vision_tokens, cache.totals.stored_vision_tokens) == (48, 29)


def test_nothing_is_shared_where_a_single_number_differs(tmp_path):
    manifest = make_manifest(n_rows=4, rows_per_shard=4)
    rows = shared_rows(manifest)
    for name in ("vision_logits", "vision_ids", "vision_tail_logsumexp", "vision_tail_mean"):
        values = array_fields(rows[1].record)[name].copy()
        if name == "vision_ids":
            free = min(set(range(40)) - set(values[0].tolist()))
            values[0, -1] = free
        elif name == "vision_logits":
            values[0, 0] += 1
        else:
            values[0] += 0.5
        different = [*rows[:1], replace(rows[1], record=changed(rows[1].record, **{name: values})), *rows[2:]]
        cache, index = written(tmp_path / name, manifest, different)
        offsets = [image["offset"] for image in index.table.to_pylist()[1]["images"]]
        assert offsets == [12, 19]
        assert_same(cache.record(1), different[1].record, "bfloat16", "int8")


def test_rows_may_come_in_any_order(tmp_path):
    """Batches of similar length reorder rows; the index is in the order of the plan."""
    manifest = make_manifest(n_rows=4, rows_per_shard=4)
    rows = shared_rows(manifest)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    writer = ShardWriter(files, 0, "a", manifest)
    for i in (2, 0, 3, 1):
        writer.add(rows[i])
    with pytest.raises(ValueError, match="row 3 was added before"):
        writer.add(rows[3])
    commit_shard(files, writer.finish())
    seal(files)
    cache = Cache.open(tmp_path)
    assert cache.sample_keys == [row.key for row in rows]
    for i, row in enumerate(rows):
        assert_same(cache.record(i), row.record, "bfloat16", "int8")


def test_a_shard_that_lacks_rows_is_not_finished(tmp_path):
    manifest = make_manifest(n_rows=4, rows_per_shard=4)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON)
    writer = ShardWriter(files, 0, "a", manifest)
    writer.add(shared_rows(manifest)[1])
    with pytest.raises(ValueError, match="its rows in the plan are 0 to 3 in order, got 1 rows"):
        writer.finish()
    writer.abandon()
    assert files.names("shards") == []
