"""The formats that people have: the same rows in each of them are the same samples."""

import base64
import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import DataFormatError, SampleError, UsageError
from emkd.samples import Dataset
from tests import tiny


@pytest.fixture
def expected(tmp_path) -> list[Any]:
    plain = Dataset(str(tiny.write_data(tmp_path / "expected" / "rows.parquet")))
    return [plain.sample(row) for row in range(plain.n_rows)]


def samples(dataset: Dataset) -> list[Any]:
    assert list(dataset.text_hashes()) == [dataset.row(row).text_sha256 for row in range(dataset.n_rows)]
    return [dataset.sample(row) for row in range(dataset.n_rows)]


# ---- JSON


@pytest.mark.parametrize("name", ["UP.JSON", "rows.jsonl.gz", "rows.JSON.GZ", "rows.ndjson", "lines.json"])
def test_json_by_other_names(tmp_path, name, expected):
    """Capitals, gzip, .ndjson, and lines in a file called .json, as `Dataset.to_json` writes them."""
    lines = name not in ("UP.JSON", "rows.JSON.GZ")
    data = tiny.write_llava(tmp_path, tiny.rows(), lines).read_bytes()
    path = tmp_path / "named" / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert samples(Dataset(str(path.parent), tmp_path)) == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("lines", [True, False])
def test_json_of_windows(tmp_path, encoding, lines, expected):
    path = tiny.write_llava(tmp_path, tiny.rows(), lines)
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    assert samples(Dataset(str(path), tmp_path)) == expected


def test_gzip_that_is_cut_short(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"messages": []}' * 99)[:-9])
    with pytest.raises(DataFormatError, match="a.jsonl.gz: not a whole gzip file: .*again"):
        Dataset(str(tmp_path / "a.jsonl.gz"))


def embedded(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        texts = [base64.b64encode(data).decode() for data in row["images"]]
        if kind == "data":
            texts = [f"data:image/png;base64,{text}" for text in texts]
        entries = [{"bytes": text, "path": None} for text in texts] if kind == "bytes" else texts
        found.append({**row, "images": entries})
    return found


@pytest.mark.parametrize("kind", ["base64", "data", "bytes"])
def test_images_in_the_text_need_no_image_root(tmp_path, kind, expected):
    (tmp_path / "rows.json").write_text(json.dumps(embedded(tiny.rows(), kind)))
    assert samples(Dataset(str(tmp_path / "rows.json"))) == expected
    if kind != "bytes":
        pq.write_table(pa.Table.from_pylist(embedded(tiny.rows(), kind)), tmp_path / "rows.parquet")
        assert samples(Dataset(str(tmp_path / "rows.parquet"))) == expected


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,###", "image-broken: a data: URI whose base64 is damaged"),
        ("data:image/png", "image-broken: a data: URI without a comma"),
        ("data:video/mp4;base64,AAAA", "video: a data: URI of type video/mp4"),
        ("https://x.org/a.png", "image-missing: 'https://x.org/a.png' is a URL, and nothing is downloaded"),
        ("a.mp4", "video: the image entry is video: 'a.mp4'"),
        ("A" * 5000, "image-missing: a text of 5000 characters is neither a path nor base64"),
        (base64.b64encode(tiny.png(1)).decode()[:-5], "image-missing|image-broken"),
    ],
)
def test_images_in_the_text_that_are_none(tmp_path, image, message):
    row = {"image": image, "messages": [tiny.turn("user", "<image>"), tiny.turn("assistant", "cat")]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(SampleError, match=message):
        Dataset(str(tmp_path / "rows.json"), tmp_path).sample(0)


def test_paths_in_parts_need_an_image_root_too(tmp_path):
    row = {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, tiny.turn("assistant", "x")]
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(UsageError, match="name their folder with --image-root FOLDER"):
        Dataset(str(tmp_path / "rows.json"))


def test_conversations_as_json_text(tmp_path, expected):
    """As tables without nested columns have them."""
    rows = [
        {"id": row["id"], "images": [{"bytes": b} for b in row["images"]], "messages": json.dumps(row["messages"])}
        for row in tiny.rows()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert samples(Dataset(str(tmp_path / "rows.parquet"))) == expected


# ---- links


def test_links_are_followed_when_a_flag_says_so(tmp_path, expected):
    """A snapshot of the hub (each file a link to a blob), and a linked folder, as LLaVA's layout has."""
    tiny.write_llava(tmp_path / "made", tiny.rows())
    root = tmp_path / "snapshots" / "0" / "root"
    root.mkdir(parents=True)
    shutil.move(tmp_path / "made" / "images", tmp_path / "elsewhere")
    (root / "images").symlink_to("../../../elsewhere")
    data = str(tmp_path / "made" / "rows.json")
    with pytest.raises(SampleError, match=r"image-outside-root: 'images/0-0.png' is reached through the link 'images', which leads outside the image root; --follow-links") as error:  # fmt: skip
        Dataset(data, root).sample(0)
    assert str(tmp_path) not in str(error.value)
    assert samples(Dataset(data, root, follow_links=True)) == expected
    (root / "images").unlink()
    (root / "images").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (root / "images" / path.name).symlink_to(path)
    with pytest.raises(SampleError, match="through the link 'images/0-0.png'"):
        Dataset(data, root).sample(0)
    assert samples(Dataset(data, root, follow_links=True)) == expected


@pytest.mark.parametrize("path", ["../secret.png", "images/../../secret.png", "{outside}/secret.png"])
def test_paths_that_leave_the_root_by_their_text_are_never_followed(tmp_path, path):
    (tmp_path / "root").mkdir()
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "root" / "images").symlink_to("../far/away")
    for folder in (tmp_path, tmp_path / "far"):
        (folder / "secret.png").write_bytes(tiny.png(1))
    row = {
        "image": path.format(outside=tmp_path),
        "messages": [tiny.turn("user", "<image>"), tiny.turn("assistant", "x")],
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    for follow in (False, True):
        with pytest.raises(SampleError, match="image-outside-root: .* is outside the image root"):
            Dataset(str(tmp_path / "rows.json"), tmp_path / "root", follow).sample(0)


# ---- Arrow


def saved_to_disk(folder: Path, n_files: int = 2, stream: bool = True) -> Path:
    """As `datasets.Dataset.save_to_disk` writes it."""
    table = pq.read_table(tiny.write_data(folder / "rows.parquet"))
    (folder / "rows.parquet").unlink()
    names = [f"data-{n:05}-of-{n_files:05}.arrow" for n in range(n_files)]
    for number, name in enumerate(names):
        part = table.slice(number * 6 // n_files, 6 // n_files)
        with (pa.ipc.new_stream if stream else pa.ipc.new_file)(folder / name, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("stream", [True, False])
def test_folders_of_save_to_disk(tmp_path, stream, expected):
    folder = saved_to_disk(tmp_path / "saved", stream=stream)
    dataset = Dataset(str(folder))
    assert samples(dataset) == expected
    assert [file.n_rows for file in dataset.files] == [3, 3]


def test_folders_of_splits_of_save_to_disk(tmp_path, expected):
    saved_to_disk(tmp_path / "saved" / "train")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert samples(Dataset(str(tmp_path / "saved"))) == expected
    saved_to_disk(tmp_path / "saved" / "test")
    with pytest.raises(UsageError, match="2 splits"):
        Dataset(str(tmp_path / "saved"))
    assert samples(Dataset(str(tmp_path / "saved" / "train"))) == expected


def test_an_arrow_file_that_is_cut_short(tmp_path):
    folder = saved_to_disk(tmp_path / "saved", 1)
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DataFormatError, match="not a readable Arrow file"):
        Dataset(str(folder))


# ---- WebDataset


def tar(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_tars_of_webdataset(tmp_path, expected):
    files: dict[str, bytes | str] = {"._junk.json": "x"}
    for number, row in enumerate(tiny.rows()):
        files[f"./part/{number:04}.json"] = json.dumps({"id": row["id"], "messages": row["messages"]})
        for place, data in enumerate(row["images"]):
            files[f"./part/{number:04}.{place}.png"] = data
    assert samples(Dataset(str(tar(tmp_path / "rows.tar", files)))) == expected


A, B = tiny.png(1), tiny.png(2)
ASK = [tiny.turn("user", "<image> what <image>"), tiny.turn("assistant", "cat")]


def test_pictures_that_json_names_are_in_its_order(tmp_path):
    row = json.dumps({"images": ["7.b.png", "some/7.a.png"], "messages": ASK})
    dataset = Dataset(str(tar(tmp_path / "rows.tar", {"7.a.png": A, "7.b.png": B, "7.json": row})))
    assert dataset.sample(0).images == (B, A)
    assert dataset.row(0).id == "7"


def test_a_text_is_a_caption_of_the_pictures(tmp_path):
    meta = json.dumps({"url": "https://x/a.jpg", "width": 24})
    dataset = Dataset(str(tar(tmp_path / "rows.tar", {"a/7.jpg": A, "a/7.txt": "red cat\n", "a/7.json": meta})))
    found = dataset.sample(0)
    assert (found.id, found.images) == ("a/7", (A,))
    assert [turn.as_message()["content"] for turn in found.turns] == [[{"type": "image"}], [{"type": "text", "text": "red cat"}]]  # fmt: skip
    assert dataset.unread() == f"{tmp_path}/rows.tar: not read: url, width"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"7.json": "{", "7.png": A}, "bad-content: '7.json' is not valid JSON"),
        ({"7.json": "[]", "7.png": A}, "bad-content: '7.json' is a list"),
        ({"7.png": A}, "no-messages"),
        ({"7.txt": b"\xff", "7.png": A}, "bad-content: '7.txt' is not valid UTF-8"),
        ({"7.txt": "cat", "7.mp4": b"x"}, "video: the row has 'mp4'"),
        ({"7.txt": "cat", "7.png": A, "7.wav": b"x"}, "audio: the row has 'wav'"),
        ({"7.json": json.dumps({"image": "7.a.png", "messages": ASK}), "7.a.png": A, "7.b.png": B}, "contradictory: .*2 pictures, its 'image' names 1"),
        ({"7.json": json.dumps({"messages": ASK}), "7.a.png": A}, "image-count"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_used_say_why(tmp_path, files, message):
    other = {"8.txt": "dog", "8.png": B}
    dataset = Dataset(str(tar(tmp_path / "rows.tar", {**files, **other})))
    with pytest.raises(SampleError, match=message):
        dataset.sample(0)
    assert dataset.sample(1).images == (B,)
    assert len(list(dataset.text_hashes())) == 2


def test_a_tar_that_is_cut_short(tmp_path):
    path = tar(tmp_path / "rows.tar", {"7.png": A * 40, "7.txt": "cat"})
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    with pytest.raises(DataFormatError, match=r"rows.tar.*(cut short|not a whole tar file)"):
        Dataset(str(path)).sample(0)
    path.write_bytes(b"no tar" * 100)
    with pytest.raises(DataFormatError, match="not a whole tar file"):
        Dataset(str(path))
