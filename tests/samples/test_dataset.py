import errno
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import DataFormatError, InputNotFoundError, SampleError, UsageError
from emkd.samples import Dataset
from emkd.samples.dataset import sampled_sha256
from emkd.samples.images import read_image_bytes
from emkd.samples.sample import ImagePart
from tests import tiny


def test_parquet_json_and_jsonl_give_identical_samples(tmp_path):
    parquet = Dataset(str(tiny.write_data(tmp_path / "rows.parquet")))
    for lines in (False, True):
        llava = Dataset(str(tiny.write_llava(tmp_path / str(lines), tiny.rows(), lines)), tmp_path / str(lines))
        assert [llava.sample(n) for n in range(llava.n_rows)] == [parquet.sample(n) for n in range(parquet.n_rows)]


def test_parts_as_lists_are_the_same_sample(tmp_path):
    row = tiny.rows()[0]
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is in this picture"}]
    answer = [{"type": "text", "text": "red cat"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    table = pa.Table.from_pylist([{"images": [{"bytes": row["images"][0]}], "messages": messages}])
    pq.write_table(table, tmp_path / "parts.parquet")
    found = Dataset(str(tmp_path / "parts.parquet")).sample(0)
    assert found.key == Dataset(str(tiny.write_data(tmp_path / "text.parquet", [row]))).sample(0).key
    assert isinstance(found.turns[0].parts[0], ImagePart)


def test_the_key_changes_with_everything_it_covers(tmp_path):
    def key(content: str, answer: str, image: int = 1) -> str:
        row = {"id": "x", "images": [tiny.png(image)], "messages": [tiny.turn("user", content), tiny.turn("assistant", answer)]}  # fmt: skip
        return Dataset(str(tiny.write_data(tmp_path / "one.parquet", [row]))).sample(0).key

    keys = [key("<image> a b", "c"), key("<image> a", "b c"), key("a b <image>", "c"), key("<image> a b", "c", 2)]
    assert len(set(keys)) == 4
    assert key("<image> a b", "c") == keys[0]


def test_rows_are_numbered_over_files_and_row_groups(tmp_path):
    rows = tiny.rows()
    tiny.write_data(tmp_path / "b.parquet", rows[:2])
    table = pq.read_table(tiny.write_data(tmp_path / "all.parquet", rows))
    pq.write_table(table.slice(2), tmp_path / "c.parquet", row_group_size=1)
    (tmp_path / "all.parquet").unlink()
    dataset = Dataset(str(tmp_path))
    assert [f.name for f in dataset.files] == ["b.parquet", "c.parquet"]
    whole = Dataset(str(tiny.write_data(tmp_path / "all" / "rows.parquet", rows)))
    assert [key for _, key in dataset.keyed_rows()] == [key for _, key in whole.keyed_rows()]
    assert dataset.row_id(3) == "one"
    assert dataset.row_id(4) == ""
    assert dataset.fingerprint != whole.fingerprint
    assert pickle.loads(pickle.dumps(dataset)).sample(5) == dataset.sample(5)  # noqa: S301


def test_the_fingerprint_sees_a_changed_file(tmp_path):
    path = tiny.write_data(tmp_path / "rows.parquet")
    before = Dataset(str(path)).fingerprint
    assert Dataset(str(path)).fingerprint == before
    rows = tiny.rows()
    rows[0]["messages"][0]["content"] = "<image>\nwhat is in this picturf"
    tiny.write_data(path, rows)
    assert Dataset(str(path)).fingerprint != before


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": []}, "no-messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "bad-role"),
        ({"images": []}, "image-count"),
        ({"images": [tiny.png(1)] * 2}, "image-count"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tmp_path, change, reason):
    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet", [{**tiny.rows()[0], **change}])))
    with pytest.raises(SampleError) as error:
        dataset.sample(0)
    assert error.value.reason == reason


@pytest.mark.parametrize(("path", "reason"), [("gone.png", "image-missing"), ("../secret.png", "image-outside-root"), ("/etc/hostname", "image-outside-root"), ("link.png", "image-outside-root")])  # fmt: skip
def test_images_stay_below_the_root(tmp_path, path, reason):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(tiny.png(1))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    turns = [{"from": "human", "value": "<image> what"}, {"from": "gpt", "value": "cat"}]
    (root / "rows.json").write_text(json.dumps([{"id": "a", "image": path, "conversations": turns}]))
    with pytest.raises(SampleError) as error:
        Dataset(str(root / "rows.json"), root).sample(0)
    assert error.value.reason == reason


def test_links_and_dots_that_stay_below_the_root_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder" / "b.png").symlink_to("../a.png")
    for path in ("a.png", "folder/../a.png", "link/b.png", str(tmp_path / "a.png")):
        assert read_image_bytes(path, tmp_path) == b"picture"


def test_a_disk_that_fails_is_not_the_rows_fault(tmp_path, monkeypatch):
    """Else a network disk that is away for a minute would cost rows that a second run finds."""

    def fail(self):
        raise OSError(errno.EIO, "Input/output error", str(self))

    (tmp_path / "a.png").write_bytes(b"picture")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*a\.png"):
        read_image_bytes("a.png", tmp_path)


@pytest.mark.parametrize(
    ("kind", "code"), [("is a folder", None), ("is a named pipe", None), ("Permission denied", errno.EACCES)]
)
def test_what_is_no_readable_file_says_what_it_is(tmp_path, monkeypatch, kind, code):
    path = tmp_path / "x.png"
    if code:

        def refuse(self):
            raise OSError(code, os.strerror(code), str(self))

        path.write_bytes(b"x")
        monkeypatch.setattr(Path, "read_bytes", refuse)
    else:
        path.mkdir() if "folder" in kind else os.mkfifo(path)
    with pytest.raises(SampleError, match=f"image-missing: .*{kind}") as error:
        read_image_bytes("x.png", tmp_path)
    assert str(tmp_path) not in str(error.value), "where a dataset lies does not belong into the index"


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


def test_wrong_calls(tmp_path):
    with pytest.raises(InputNotFoundError, match="no data at .*nowhere.*expected a .parquet"):
        Dataset(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--image-root FOLDER"):
        Dataset(str(tiny.write_llava(tmp_path, tiny.rows())))
    with pytest.raises(InputNotFoundError, match="is not a folder"):
        Dataset(str(tmp_path / "rows.json"), Path("/nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataFormatError, match=r"notes.txt is none of .parquet"):
        Dataset(str(tmp_path / "notes.txt"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataFormatError, match="not a readable Parquet file"):
        Dataset(str(tmp_path / "broken.parquet"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataFormatError, match="not valid JSON"):
        Dataset(str(tmp_path / "broken.json"), tmp_path)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataFormatError, match="no column 'messages'"):
        Dataset(str(tmp_path / "other.parquet"))


ODD_ROWS = [
    {"messages": "text"},
    {"messages": {"role": "user"}},
    {"messages": [None]},
    {"messages": ["hello"]},
    {"messages": [{"role": "user", "content": ["hello"]}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"image": "a\0b", "messages": [{"role": "user", "content": "<image>"}]},
    {"image": {"bytes": "abc"}, "messages": [{"role": "user", "content": "<image>"}]},
    {"image": 5, "messages": [{"role": "user", "content": "<image>"}]},
]


@pytest.mark.parametrize("number", range(len(ODD_ROWS)))
def test_malformed_rows_are_refused_as_rows(tmp_path, number):
    """Whatever is in a row, it costs that row alone."""
    (tmp_path / "rows.json").write_text(json.dumps([ODD_ROWS[number]]))
    with pytest.raises(SampleError, match=r"bad-content|bad-role|image-missing"):
        Dataset(str(tmp_path / "rows.json"), tmp_path).sample(0)


def test_what_lies_beside_the_data(tmp_path):
    tiny.write_data(tmp_path / "rows.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert Dataset(str(tmp_path)).n_rows == 6
    pq.write_table(
        pa.table({"image": ["x"], "messages": [[{"role": "user", "content": "x"}]]}), tmp_path / "one.parquet"
    )
    with pytest.raises(DataFormatError, match="column 'image'; rename it to 'images'"):
        Dataset(str(tmp_path / "one.parquet"))
    (tmp_path / "rows.jsonl").write_text('\n   \n{"messages": []}\n\n')
    assert Dataset(str(tmp_path / "rows.jsonl"), tmp_path).n_rows == 1
