import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import DataFormatError, InputNotFoundError, SampleError, UsageError
from emkd.samples import Dataset
from emkd.samples.dataset import sampled_sha256
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
