"""One file as rows: errors about damage of every kind say where it is, and texts are read without images."""

import errno
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import DataFormatError
from emkd.samples import Dataset
from emkd.samples.sources import sampled_sha256
from tests import tiny


def test_texts_are_read_without_images(tmp_path, monkeypatch):
    """Also the texts of rows whose images are missing, and of rows around one that is not UTF-8."""
    rows = [tiny.rows()[0], {**tiny.rows()[1], "id": "damaged"}, tiny.rows()[3]]
    path = tiny.write_data(tmp_path / "rows.parquet", rows)
    columns: list[list[str]] = []
    plain = pq.ParquetFile.read_row_group

    def read(self, group, *, columns: list[str], noted=columns):
        noted.append(columns)
        return plain(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    assert all(Dataset(str(path)).text_hashes())
    assert columns == [["messages"]]
    folder = tmp_path / "llava"
    dataset = Dataset(str(tiny.write_llava(folder, rows)), folder)
    shutil.rmtree(folder / "images")
    assert list(dataset.text_hashes()) == list(Dataset(str(path)).text_hashes())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"messages": []}\n\n{"messages": [}\n', "a.jsonl, line 3, column 15: not valid JSON: Expecting value$"),
        ("a.jsonl", b'{"messages": []}\n{"a": "\xff"}\n', "a.jsonl, line 2: not valid JSON: .*can't decode byte 0xff"),
        ("a.jsonl", b'{"messages": []}\n[1]\n', "a.jsonl, line 2: is a list, expected an object"),
        ("a.jsonl", b"{}\n" + b"[" * 100_000, "a.jsonl, line 2: not valid JSON: .*recursion"),
        ("a.json", b'[{"messages": []},\n {"messages" []}]', "a.json, line 2, column 14: not valid JSON: Expecting ':' delimiter$"),
        ("a.json", b'[{"messages": []}]\n[{"messages": []}]', "a.json, line 2, column 1: .*Extra data; .*name the file .jsonl"),
        ("a.json", b'{"messages": []}\n{"messages": [}', "a.json, line 2, column 15: not valid JSON"),
        ("a.json", b'{"messages": []}', "a.json must hold a list of objects, one per sample; it is an object"),
        ("a.json", b'[{"messages": []}, null]', "a.json, row 1: is null, expected an object"),
    ],
)  # fmt: skip
def test_where_json_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        Dataset(str(tmp_path / name), tmp_path)


def test_the_digest_of_a_large_file_reads_all_over_it(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(4096))
    before = sampled_sha256(path, block=64, n_blocks=8)
    found = []
    for place in (0, 4095, 2048 + 256):
        changed = bytearray(4096)
        changed[place] = 1
        path.write_bytes(changed)
        found.append(sampled_sha256(path, block=64, n_blocks=8))
    assert len({before, *found}) == 4


@pytest.mark.parametrize("checksums", [False, True])
def test_damaged_pages_name_the_file_and_the_row_group(tmp_path, checksums):
    """The footer is whole, so that the file opens; the other row groups can be read."""
    path = tmp_path / "rows.parquet"
    table = pq.read_table(tiny.write_data(path))
    # Uncompressed pages without checksums are damaged in their structure, with checksums in a letter alone.
    pq.write_table(
        table, path, row_group_size=2, compression="none", use_dictionary=False, write_page_checksum=checksums
    )
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(4)
    if checksums:
        place = data.index(b"is that one red")
        data[place : place + 2] = b"as"
    else:
        place = column.data_page_offset
        data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    dataset = Dataset(str(path))
    with pytest.raises(DataFormatError, match=r"rows\.parquet: row group 1 \(rows 2 to 3\) of 3 is damaged.*again"):
        dataset.sample(2)
    assert dataset.sample(1).key
    assert dataset.sample(4).key


def test_a_row_group_that_the_disk_does_not_give_names_its_file(tmp_path, monkeypatch):
    def fail(self, *args, **options):
        raise OSError(errno.EIO, "Input/output error")

    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet")))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(OSError, match=r"rows\.parquet, row group 0: .*Input/output error") as error:
        dataset.sample(0)
    assert not isinstance(error.value, DataFormatError)
    assert error.value.errno == errno.EIO


def test_a_row_group_of_fewer_rows_than_its_footer_says(tmp_path, monkeypatch):
    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet")))
    short = pq.read_table(tmp_path / "rows.parquet")[:4]
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, *args, **options: short)
    with pytest.raises(DataFormatError, match="row group 0 .* is damaged: 4 rows, the footer says 6"):
        dataset.sample(0)


def test_a_machine_without_memory_does_not_damage_a_file(tmp_path, monkeypatch):
    def fail(self, *args, **options):
        raise pa.lib.ArrowMemoryError("malloc failed")

    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet")))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(MemoryError, match="malloc failed"):
        dataset.sample(0)


def test_files_and_row_groups_without_rows(tmp_path):
    whole = Dataset(str(tiny.write_data(tmp_path / "whole" / "rows.parquet")))
    table = pq.read_table(tmp_path / "whole" / "rows.parquet")
    for name, part in (("a", table[:0]), ("b", table[:2]), ("c", table[:0]), ("e", table[:0])):
        pq.write_table(part, tmp_path / f"{name}.parquet")
    with pq.ParquetWriter(tmp_path / "d.parquet", table.schema) as writer:
        for part in (table[:0], table[2:3], table[:0], table[3:]):
            writer.write_table(part)
    dataset = Dataset(str(tmp_path))
    assert [dataset.sample(n) for n in range(dataset.n_rows)] == [whole.sample(n) for n in range(6)]
