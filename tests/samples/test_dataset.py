import errno
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import DataFormatError, InputNotFoundError, SampleError, UsageError
from emkd.samples import Dataset
from emkd.samples.conversation import IMAGE_MARK
from emkd.samples.encode import Encoder
from emkd.samples.image_entry import ImageFolder, read_image_bytes
from emkd.samples.sample import ImagePart
from tests import tiny


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


def as_parts(rows: list[dict]) -> list[dict]:
    """The same conversations with lists of parts for contents."""
    found = []
    for row in rows:
        messages = []
        for message in row["messages"]:
            pieces = IMAGE_MARK.split(message["content"])
            parts = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
            for piece in pieces[1:]:
                parts += [{"type": "image", "text": None}, *([{"type": "text", "text": piece}] if piece else [])]
            messages.append({"role": message["role"], "content": parts})
        found.append({"id": row["id"], "images": [{"bytes": data} for data in row["images"]], "messages": messages})
    return found


@pytest.fixture
def everywhere(tmp_path) -> dict[str, Dataset]:
    """The same rows in each format."""
    pq.write_table(pa.Table.from_pylist(as_parts(tiny.rows())), tmp_path / "parts.parquet")
    found = {"parquet": Dataset(str(tiny.write_data(tmp_path / "rows.parquet")))}
    found["parts"] = Dataset(str(tmp_path / "parts.parquet"))
    for lines in (False, True):
        folder = tmp_path / f"lines-{lines}"
        found[folder.name] = Dataset(str(tiny.write_llava(folder, tiny.rows(), lines)), folder)
    return found


def test_all_formats_give_identical_samples_and_token_ids(everywhere):
    """And the same hashes of texts, whether by row or over all rows."""
    encoder = Encoder(tiny.new_processor(), tiny.SPECIALS.index("<image>"))
    plain = everywhere.pop("parquet")
    texts = list(plain.text_hashes())
    assert len(set(texts)) == plain.n_rows == 6
    for name, dataset in everywhere.items():
        assert list(dataset.text_hashes()) == [dataset.row(row).text_sha256 for row in range(6)] == texts, name
        for row in range(plain.n_rows):
            assert dataset.sample(row) == plain.sample(row), (name, row)
            ours, theirs = encoder(dataset.sample(row)), encoder(plain.sample(row))
            assert ours.inputs["input_ids"].tolist() == theirs.inputs["input_ids"].tolist()
            assert ours.answer_positions.tolist() == theirs.answer_positions.tolist()
            assert (ours.key, ours.images) == (theirs.key, theirs.images)


def test_parquet_of_llava_style(tmp_path):
    """As instruction data on the hub are: `conversations` of from and value, one picture in `image`, or none."""
    names = {"user": "human", "assistant": "gpt"}
    chosen = [row for row in tiny.rows() if len(row["images"]) < 2]
    content = [
        {
            "id": row["id"],
            "image": {"bytes": row["images"][0], "path": "x.png"} if row["images"] else None,
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]],
            "data_source": "somewhere",
        }
        for row in chosen
    ]
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "llava.parquet")
    found, plain = (
        Dataset(str(tmp_path / "llava.parquet")),
        Dataset(str(tiny.write_data(tmp_path / "x.parquet", chosen))),
    )
    assert found.n_rows == plain.n_rows == 4
    assert [found.sample(row) for row in range(4)] == [plain.sample(row) for row in range(4)]
    assert list(found.text_hashes()) == list(plain.text_hashes())


def test_every_assistant_turn_is_an_answer(everywhere):
    encoder = Encoder(tiny.new_processor(), tiny.SPECIALS.index("<image>"))
    for dataset in everywhere.values():
        found = encoder(dataset.sample(4))
        assert encoder.words(found.text_ids[found.answer_positions].tolist()) == "dog <end> small green cat <end>"


def test_hashes_of_texts_see_all_but_the_images(tmp_path):
    row = tiny.rows()[1]
    other_image = {**row, "images": [tiny.png(2), tiny.png(9)]}
    moved = {**row, "messages": [tiny.turn("user", "<image> and what is that <image>"), row["messages"][1]]}
    said = {**row, "messages": [row["messages"][0], tiny.turn("assistant", "big cat")]}
    role = {**row, "messages": [tiny.turn("system", row["messages"][0]["content"]), row["messages"][1]]}
    broken = {**row, "messages": []}
    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet", [row, other_image, moved, said, role, broken])))
    first, second, *others, last = dataset.text_hashes()
    assert first == second
    assert len({first, *others}) == 4
    assert last == ""


def test_the_key_changes_with_everything_it_covers(tmp_path):
    def key(content: str, answer: str, image: int = 1) -> str:
        row = {"id": "x", "images": [tiny.png(image)], "messages": [tiny.turn("user", content), tiny.turn("assistant", answer)]}  # fmt: skip
        return Dataset(str(tiny.write_data(tmp_path / "one.parquet", [row]))).sample(0).key

    keys = [key("<image> a b", "c"), key("<image> a", "b c"), key("a b <image>", "c"), key("<image> a b", "c", 2)]
    assert len(set(keys)) == 4
    assert key("<image> a b", "c") == keys[0]


def naive_hash(start: bytes, parts: list[tuple[bytes, bytes]]) -> str:
    """As docs/format.md says."""
    return hashlib.sha256(
        start + b"".join(tag + struct.pack("<q", len(data)) + data for tag, data in parts)
    ).hexdigest()


def test_hashes_are_what_the_format_says(everywhere):
    """Keys are in caches, so their definition never changes."""
    question, answer = (b"T", b" what is that"), (b"T", b"big dog")
    for dataset in everywhere.values():
        images = [(b"I", tiny.png(2)), (b"T", b" and "), (b"I", tiny.png(3))]
        parts = [(b"R", b"user"), *images, question, (b"R", b"assistant"), answer]
        assert dataset.sample(1).key == naive_hash(b"emkd-sample-1", parts)
        without = [(tag, b"" if tag == b"I" else data) for tag, data in parts]
        assert dataset.row(1).text_sha256 == naive_hash(b"emkd-text-1", without)


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
    assert dataset.row(3).id == "one"
    assert dataset.row(4).id == ""
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
        assert read_image_bytes(path, ImageFolder(path=tmp_path)) == b"picture"


def test_a_disk_that_fails_is_not_the_rows_fault(tmp_path, monkeypatch):
    """Otherwise a network disk that fails for a minute would skip rows that a second run finds."""

    def fail(self):
        raise OSError(errno.EIO, "Input/output error", str(self))

    (tmp_path / "a.png").write_bytes(b"picture")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*a\.png"):
        read_image_bytes("a.png", ImageFolder(path=tmp_path))


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
        read_image_bytes("x.png", ImageFolder(path=tmp_path))
    assert str(tmp_path) not in str(error.value), "where a dataset lies does not belong into the index"


def test_wrong_calls(tmp_path):
    with pytest.raises(InputNotFoundError, match="no data at .*nowhere.*expected a .parquet"):
        Dataset(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--image-root FOLDER"):
        Dataset(str(tiny.write_llava(tmp_path, tiny.rows())))
    with pytest.raises(InputNotFoundError, match="is not a folder"):
        Dataset(str(tmp_path / "rows.json"), Path("/nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataFormatError, match=r"notes.txt: unknown format; expected one of .parquet"):
        Dataset(str(tmp_path / "notes.txt"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataFormatError, match="not a readable Parquet file"):
        Dataset(str(tmp_path / "broken.parquet"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataFormatError, match="not valid JSON"):
        Dataset(str(tmp_path / "broken.json"), tmp_path)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataFormatError, match="no column 'messages' or 'conversations'; it has"):
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
    """Any content of a row affects only that row."""
    (tmp_path / "rows.json").write_text(json.dumps([ODD_ROWS[number]]))
    with pytest.raises(SampleError, match=r"bad-content|bad-role|image-missing"):
        Dataset(str(tmp_path / "rows.json"), tmp_path).sample(0)


def test_what_lies_beside_the_data(tmp_path):
    tiny.write_data(tmp_path / "rows.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert Dataset(str(tmp_path)).n_rows == 6
    (tmp_path / "rows.jsonl").write_text('\n   \n{"messages": []}\n\n')
    assert Dataset(str(tmp_path / "rows.jsonl"), tmp_path).n_rows == 1
