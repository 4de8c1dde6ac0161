"""Which samples of a cache a run trains on: the samples of its data, found by the plan, by text or by key."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emkd.errors import DataMismatchError
from emkd.samples import Dataset
from emkd.storage.cache import Cache
from emkd.storage.index.commit import read_index
from emkd.storage.index.table import FIRST_SCHEMA
from emkd.storage.lifecycle.seal import seal
from emkd.storage.objects.names import index_name
from emkd.trainer.data.selection import N_CHECKED, select
from tests import tiny


def rows(first: int, last: int) -> list[dict]:
    """Rows with different contents."""
    found = []
    for number in range(first, last):
        row = tiny.rows()[number % 6]
        images = [tiny.png(100 * number + n) for n in range(len(row["images"]))]
        text = [tiny.turn(m["role"], m["content"] + " that" * (number // 6)) for m in row["messages"]]
        found.append({"id": f"row-{number}", "images": images, "messages": text})
    return found


@pytest.fixture(scope="module")
def folder(teacher_path, tmp_path_factory):
    """A cache of rows 0 to 7, then of a file that has 4 to 11 as well, then of one with 10 to 13 and 0 to 2."""
    made = tmp_path_factory.mktemp("selection")
    tiny.write_data(made / "first.parquet", rows(0, 8))
    tiny.write_data(made / "second.parquet", rows(4, 12))
    tiny.write_data(made / "third.parquet", rows(10, 14) + rows(0, 3))
    for name in ("first", "second", "third"):
        tiny.make_cache(
            teacher_path, made / f"{name}.parquet", made / "cache", extend=name != "first", rows_per_shard=3
        )
    return made


@pytest.fixture(scope="module")
def cache(folder) -> Cache:
    return Cache.open(folder / "cache")


def expected(cache: Cache, dataset: Dataset) -> dict[int, int]:
    """Naive: sample number -> row, by the keys of all rows."""
    keys = {key: row for row, key in reversed(list(dataset.keyed_rows()))}
    return {number: keys[key] for number, key in enumerate(cache.sample_keys) if key in keys}


def test_each_row_is_in_the_cache_once(cache, folder):
    assert cache.n_samples == 14
    assert len(set(cache.sample_keys)) == 14
    assert len(cache.manifest.extensions) == 2
    everything = {
        key for name in ("first", "second", "third") for _, key in Dataset(str(folder / f"{name}.parquet")).keyed_rows()
    }
    assert set(cache.sample_keys) == everything


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_files_that_were_cached_are_known_without_reading_them(cache, folder, name, monkeypatch):
    dataset = Dataset(str(folder / f"{name}.parquet"))
    naive = expected(cache, dataset)
    monkeypatch.setattr(Dataset, "keyed_rows", None)
    told: list[str] = []
    chosen = select(cache, dataset, told.append)
    assert dict(zip(chosen.numbers.tolist(), chosen.rows.tolist(), strict=True)) == naive
    assert len(naive) == dataset.n_rows
    assert told == [f"{dataset.n_rows} of the cache's 14 samples are in {dataset.data}"]


def test_other_files_are_compared_by_their_texts(cache, tmp_path):
    some = tiny.write_data(tmp_path / "some.parquet", [*rows(9, 11), *rows(2, 5)])
    told: list[str] = []
    dataset = Dataset(str(some))
    chosen = select(cache, dataset, told.append)
    assert dict(zip(chosen.numbers.tolist(), chosen.rows.tolist(), strict=True)) == expected(cache, dataset)
    assert len(chosen.rows) == 5
    assert (np.diff(chosen.numbers) > 0).all()
    assert "comparing all rows by their texts" in told[0]
    assert told[1].startswith("5 of the cache's 14 samples are in")
    sizes = chosen.shard_sizes(cache)
    naive = [sum(int(n) in cache.samples_of_shard(shard) for n in chosen.numbers) for shard in cache.shards]
    assert sizes == naive
    assert sum(sizes) == 5


def test_rows_that_the_cache_lacks_are_refused(cache, tmp_path):
    more = tiny.write_data(tmp_path / "more.parquet", rows(12, 17))
    with pytest.raises(DataMismatchError, match=r"3 of its 5 rows are not in it; the first is row 2 .*--extend"):
        select(cache, Dataset(str(more)), print)
    other = tiny.write_data(tmp_path / "other.parquet", rows(20, 22))
    with pytest.raises(DataMismatchError, match="2 of its 2 rows are not in it"):
        select(cache, Dataset(str(other)), print)


def test_a_limited_cache_does_not_know_all_rows(teacher_path, folder, tmp_path):
    tiny.make_cache(teacher_path, folder / "first.parquet", tmp_path / "cache", limit=5, rows_per_shard=3)
    limited = Cache.open(tmp_path / "cache")
    copy = tiny.write_data(tmp_path / "copy.parquet", [*rows(0, 8)][::-1])
    told: list[str] = []
    for data in (folder / "first.parquet", copy):
        chosen = select(limited, Dataset(str(data)), told.append)
        assert len(chosen.rows) == 5
    assert sum("3 of 8 rows" in line for line in told) == 2
    tiny.make_cache(teacher_path, folder / "first.parquet", tmp_path / "cache", extend=True, rows_per_shard=3)
    assert len(select(Cache.open(tmp_path / "cache"), Dataset(str(folder / "first.parquet")), told.append).rows) == 8


def test_a_cache_with_none_of_the_rows(teacher_path, folder, tmp_path):
    tiny.make_cache(teacher_path, folder / "first.parquet", tmp_path / "cache", limit=2, rows_per_shard=2)
    other = tiny.write_data(tmp_path / "other.parquet", rows(20, 22))
    with pytest.raises(DataMismatchError, match="no row of .* has a sample in the cache"):
        select(Cache.open(tmp_path / "cache"), Dataset(str(other)), print)


def test_a_limited_cache_that_was_extended_to_all_rows_knows_them(teacher_path, folder, tmp_path):
    first = folder / "first.parquet"
    tiny.make_cache(teacher_path, first, tmp_path / "cache", limit=5, rows_per_shard=3)
    tiny.make_cache(teacher_path, first, tmp_path / "cache", extend=True, rows_per_shard=3)
    foreign = tiny.write_data(tmp_path / "foreign.parquet", [*rows(0, 8), *rows(20, 21)])
    with pytest.raises(DataMismatchError, match="1 of its 9 rows are not in it; the first is row 8"):
        select(Cache.open(tmp_path / "cache"), Dataset(str(foreign)), print)


def test_an_unsealed_cache_does_not_know_all_rows(teacher_path, folder, tmp_path):
    cache = tiny.make_cache(teacher_path, folder / "first.parquet", tmp_path / "cache", rows_per_shard=3)
    (cache / "seal.json").unlink()
    (cache / "index" / "000001.parquet").unlink()
    copy = tiny.write_data(tmp_path / "copy.parquet", rows(0, 8))
    chosen = select(Cache.open(cache, partial=True), Dataset(str(copy)), print)
    assert chosen.rows.tolist() == [0, 1, 2, 6, 7]
    assert chosen.numbers.tolist() == [0, 1, 2, 3, 4]


def test_what_is_repeated_is_trained_on_as_often_as_the_data_have_it(teacher_path, tmp_path):
    """Rows found by the plan, by key and through an extension give the same selection."""
    first, second, third = rows(0, 3)
    data = tiny.write_data(tmp_path / "data.parquet", [first, second, first])
    tiny.make_cache(teacher_path, data, tmp_path / "cache", rows_per_shard=2)
    more = tiny.write_data(tmp_path / "more.parquet", [third, second, second])
    tiny.make_cache(teacher_path, more, tmp_path / "cache", extend=True, rows_per_shard=2)
    cache, told = Cache.open(tmp_path / "cache"), []
    assert cache.n_samples == 4

    def found(path) -> dict[int, int]:
        chosen = select(cache, Dataset(str(path)), told.append)
        assert (np.diff(chosen.numbers) >= 0).all()
        assert sum(chosen.shard_sizes(cache)) == len(chosen.rows)
        return dict(zip(chosen.rows.tolist(), chosen.numbers.tolist(), strict=True))

    assert found(data) == {0: 0, 1: 1, 2: 2}
    assert found(more) == {0: 3, 1: 1, 2: 1}
    assert found(tiny.write_data(tmp_path / "copy.parquet", [second, first, first, first])) == {0: 1, 1: 0, 2: 2, 3: 0}
    assert found(tiny.write_data(tmp_path / "once.parquet", [first])) == {0: 0}
    assert not any("have no sample" in line for line in told)


def test_a_limit_of_the_first_data_is_not_forgotten(teacher_path, folder, tmp_path):
    """The newest plan is whole, the first one is not: a copy of the first data is still known to be its data."""
    tiny.make_cache(teacher_path, folder / "first.parquet", tmp_path / "cache", limit=5, rows_per_shard=3)
    second = tiny.write_data(tmp_path / "second.parquet", rows(20, 22))
    tiny.make_cache(teacher_path, second, tmp_path / "cache", extend=True, rows_per_shard=3)
    copy = tiny.write_data(tmp_path / "copy.parquet", rows(0, 8))
    assert len(select(Cache.open(tmp_path / "cache"), Dataset(str(copy)), print).rows) == 5


def test_the_hash_tells_selections_apart(cache, folder, tmp_path):
    def sha256(path) -> str:
        return select(cache, Dataset(str(path)), lambda text: None).sha256(cache)

    part = tiny.write_data(tmp_path / "part.parquet", rows(2, 5))
    assert sha256(part) == sha256(tiny.write_data(tmp_path / "same.parquet", rows(2, 5)))
    assert (
        len(
            {
                sha256(part),
                sha256(folder / "first.parquet"),
                sha256(tiny.write_data(tmp_path / "b.parquet", rows(2, 5)[::-1])),
            }
        )
        == 3
    )


def test_the_hash_is_of_one_json_text_however_it_is_cut(cache, folder, monkeypatch):
    """A run that an earlier version started can be resumed: the hash is in its run.json."""
    chosen = select(cache, Dataset(str(folder / "first.parquet")), lambda text: None)
    keys = [cache.sample_keys[number] for number in chosen.numbers]
    listing = json.dumps([keys, chosen.rows.tolist(), chosen.shard_sizes(cache)])
    for piece in (1, 3, 8, 100):
        monkeypatch.setattr("emkd.trainer.data.selection.PIECE", piece)
        assert chosen.sha256(cache) == hashlib.sha256(listing.encode()).hexdigest()


def test_skipped_rows_are_known_and_not_trained_on(teacher_path, tmp_path):
    """In another file, too: a row whose image does not decode has a key."""
    broken = rows(0, 4)
    broken[1]["images"][0] = b"broken"
    data = tiny.write_data(tmp_path / "data.parquet", broken)
    cache = Cache.open(tiny.make_cache(teacher_path, data, tmp_path / "cache"))
    told: list[str] = []
    for other in (data, tiny.write_data(tmp_path / "copy.parquet", broken)):
        chosen = select(cache, Dataset(str(other)), told.append)
        assert chosen.rows.tolist() == [0, 2, 3]
    assert sum("1 of 4 rows of" in line for line in told) == 2
    assert sum("1 of 4 rows have texts that occur more than once" in line for line in told) == 1, (
        "what was skipped is looked at"
    )


@pytest.fixture
def llava(tmp_path) -> Dataset:
    """Rows 2 to 9 as JSON, in another order."""
    chosen = [*rows(6, 10), *rows(2, 6)]
    return Dataset(str(tiny.write_llava(tmp_path / "llava", chosen)), tmp_path / "llava")


def test_no_image_is_opened_to_find_a_row(cache, llava):
    """The folder of images is gone, and all rows are found, because no text repeats."""
    naive = expected(cache, llava)
    shutil.rmtree(llava.image_root / "images")
    assert llava.key(0) is None
    told: list[str] = []
    chosen = select(cache, llava, told.append)
    assert dict(zip(chosen.numbers.tolist(), chosen.rows.tolist(), strict=True)) == naive
    assert len(naive) == 8
    assert not any("reading their images" in line for line in told)


def test_only_a_few_images_are_read(cache, folder, tmp_path, monkeypatch):
    read: list[int] = []
    plain = Dataset.sample
    monkeypatch.setattr(Dataset, "sample", lambda self, row: (read.append(row), plain(self, row))[1])
    copy = tiny.write_data(tmp_path / "copy.parquet", [*rows(10, 14), *rows(0, 10)])
    for data in (copy, folder / "second.parquet"):
        read.clear()
        assert len(select(cache, Dataset(str(data)), print).rows) in (14, 8)
        assert len(read) == N_CHECKED
        assert max(read) - min(read) >= 7, "all over the data"


def test_other_images_under_the_same_texts_are_noticed_at_once(cache, llava):
    for path in (llava.image_root / "images").iterdir():
        path.write_bytes(tiny.png(1))
    with pytest.raises(
        DataMismatchError, match=r"row \d \(id 'row-\d'\) .* is not what the teacher saw: its key .*--image-root"
    ):
        select(cache, llava, print)


def same_text(first: int, last: int) -> list[dict]:
    """Rows that differ only in their image."""
    messages = [tiny.turn("user", "<image> what is that"), tiny.turn("assistant", "red cat")]
    return [{"id": f"same-{n}", "images": [tiny.png(n)], "messages": messages} for n in range(first, last)]


def test_rows_of_the_same_text_are_told_apart_by_their_images(teacher_path, tmp_path):
    """In both cases: the cache repeats a text, or only the data do."""
    data = tiny.write_data(tmp_path / "data.parquet", [*same_text(0, 3), *rows(0, 3)])
    cache = Cache.open(tiny.make_cache(teacher_path, data, tmp_path / "cache"))
    some = tiny.write_data(tmp_path / "some.parquet", [*same_text(2, 3), *rows(1, 2), *same_text(0, 1)])
    told: list[str] = []
    chosen = select(cache, Dataset(str(some)), told.append)
    assert dict(zip(chosen.rows.tolist(), chosen.numbers.tolist(), strict=True)) == {0: 2, 1: 4, 2: 0}
    assert "2 of 3 rows have texts that occur more than once: reading their images" in told
    other = tiny.write_data(tmp_path / "other.parquet", [*same_text(1, 2), *same_text(8, 10)])
    with pytest.raises(
        DataMismatchError, match=r"2 of its 3 rows are not in it; the first is row 1 with key [0-9a-f]{12}"
    ):
        select(cache, Dataset(str(other)), print)
    single = tiny.write_data(tmp_path / "single.parquet", [*same_text(1, 2), *rows(0, 2)])
    cache = Cache.open(tiny.make_cache(teacher_path, single, tmp_path / "once"))
    with pytest.raises(DataMismatchError, match="2 of its 3 rows are not in it; the first is row 1"):
        select(cache, Dataset(str(other)), print)


def without_texts(path: Path) -> Cache:
    """The cache as a version wrote it that kept no hashes of texts."""
    files = Cache.open(path).files
    for shard in Cache.open(path).shards:
        index = read_index(files, shard)
        data = replace(index, table=index.table.select(FIRST_SCHEMA.names)).to_bytes()
        (path / index_name(shard)).write_bytes(data)
    (path / "seal.json").unlink()
    (path / "index.parquet").unlink()
    seal(files)
    return Cache.open(path)


def test_a_cache_without_hashes_of_texts_is_compared_by_key(teacher_path, folder, tmp_path):
    first = folder / "first.parquet"
    tiny.make_cache(teacher_path, first, tmp_path / "cache", rows_per_shard=3, first_format=True)
    copy = Dataset(str(tiny.write_data(tmp_path / "copy.parquet", rows(0, 8)[::-1])))
    now = select(Cache.open(tmp_path / "cache"), copy, print)
    told: list[str] = []
    older = select(without_texts(tmp_path / "cache"), copy, told.append)
    assert (older.numbers.tolist(), older.rows.tolist()) == (now.numbers.tolist(), now.rows.tolist())
    assert "stored no hashes of texts; comparing all rows by key, which reads every image" in told[0]
    assert len(select(Cache.open(tmp_path / "cache"), Dataset(str(folder / "first.parquet")), print).rows) == 8
