"""Row groups that are read in pieces give the rows of those that are read whole, in any order, and hold few of them."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import DataFormatError
from emkd.samples import Dataset
from emkd.samples.sources import parquet
from tests import tiny

N = 60


@pytest.fixture
def rows():
    chosen = [{**tiny.rows()[n % 6], "id": str(n)} for n in range(N)]
    return [{**row, "images": [tiny.png(9 * n + i) for i in range(len(row["images"]))]} for n, row in enumerate(chosen)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(parquet, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 50_000)


def write(path, rows, **options):
    pq.write_table(pq.read_table(tiny.write_data(path, rows)), path, **options)
    return path


@pytest.fixture
def whole(tmp_path, rows):
    """What a dataset gives that reads its row groups whole."""
    dataset = Dataset(str(write(tmp_path / "rows.parquet", rows)))
    return dataset.fingerprint, [dataset.sample(row) for row in range(N)], list(dataset.text_hashes())


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("group", [None, 25])
def test_rows_in_any_order(tmp_path, rows, whole, small_pieces, order, group):
    """As a cache is made, and as training reads; the same fingerprint and numbers, so that caches resume."""
    path = write(tmp_path / "rows.parquet", rows, row_group_size=group)
    dataset = Dataset(str(path))
    source = dataset._sources[0]
    assert source._piece_rows(0, source._columns) < 25 // 2, "several pieces a group"
    numbers = list(range(N))[:: -1 if order == "backward" else 1]
    if order == "shuffled":
        random.Random(0).shuffle(numbers)
    found = {row: dataset.sample(row) for row in numbers}
    assert [found[row] for row in range(N)] == whole[1]
    assert list(dataset.text_hashes()) == whole[2]
    assert group is not None or dataset.fingerprint == whole[0]
    assert sum(table.nbytes for table in source._pieces.values()) <= parquet.KEPT_BYTES


def test_rows_in_order_cost_one_pass(tmp_path, rows, small_pieces, monkeypatch):
    """And a jump back one more."""
    passes = []
    plain = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **o: (passes.append(1), plain(self, **o))[1])
    dataset = Dataset(str(write(tmp_path / "rows.parquet", rows)))
    for row in range(N):
        dataset.sample(row)
    assert len(passes) == 1
    dataset.sample(0)
    dataset.sample(N // 2)
    assert len(passes) == 2


def test_rows_of_very_different_sizes(tmp_path, rows, small_pieces):
    rows[6]["images"] = [tiny.png(7, 300, 300)]
    dataset = Dataset(str(write(tmp_path / "rows.parquet", rows)))
    assert [dataset.row(row).id for row in range(N)] == [str(row) for row in range(N)]
    assert dataset.sample(6).images == (tiny.png(7, 300, 300),)


def test_damage_in_a_piece_names_its_row_group(tmp_path, rows, small_pieces):
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "data_page_size": 2000}
    path = write(tmp_path / "rows.parquet", rows, **options)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"\x89PNG")
    data[place - 60 : place] = b"\xff" * 60
    path.write_bytes(data)
    dataset = Dataset(str(path))
    assert dataset.sample(0).images == (tiny.png(0),)
    with pytest.raises(DataFormatError, match=r"rows\.parquet: row group 0 \(rows 0 to 59\) of 1 is damaged"):
        [dataset.sample(row) for row in range(N)]


def test_more_than_arrow_can_hold_is_no_damage(tmp_path, rows, monkeypatch):
    """What Arrow says of 2 GB in one list; the real thing is benchmarks/storage/large_row_group.py."""
    dataset = Dataset(str(write(tmp_path / "rows.parquet", rows)))

    def fail(self, *args, **options):
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(DataFormatError, match="rows of very different sizes, .* smaller row_group_size"):
        dataset.sample(0)
