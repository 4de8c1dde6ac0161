"""Which files --data names: what is data, what lies beside it, and what is refused with the way forward."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import DataFormatError, InputNotFoundError, UsageError
from emkd.samples import Dataset
from emkd.samples.sources.find import absolute_data, find_files
from tests import tiny


def names(data: Path | str) -> list[str]:
    return [path.name for path in find_files(str(data))]


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")


def test_files_that_begin_with_a_dot_are_no_data(tmp_path):
    tiny.write_data(tmp_path / "train.parquet")
    touch(tmp_path, "._train.parquet", ".DS_Store", ".hidden.json")
    assert names(tmp_path) == ["train.parquet"]
    assert Dataset(str(tmp_path)).n_rows == 6


def test_of_a_clone_of_a_hub_data_set_the_parquet_files_are_the_data(tmp_path):
    touch(tmp_path, "README.md", ".gitattributes", ".git/objects/x.parquet")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    path = tiny.write_data(tmp_path / "data" / "train-00000-of-00002-0123456789abcdef.parquet")
    shutil.copy(path, tmp_path / "data" / "train-00001-of-00002-0123456789abcdef.parquet")
    assert Dataset(str(tmp_path)).n_rows == 12
    touch(tmp_path, "data/test-00000-of-00001-0123456789abcdef.parquet")
    with pytest.raises(
        UsageError, match=r"has 2 splits; name one of them: --data '.*/data/test\*.parquet', '.*train\*"
    ):
        find_files(str(tmp_path))
    assert len(names(tmp_path / "data" / "train*.parquet")) == 2


def test_splits_that_are_folders_or_files(tmp_path):
    touch(tmp_path, "a/train/0000.parquet", "a/train/0001.parquet")
    assert names(tmp_path) == ["0000.parquet", "0001.parquet"]
    touch(tmp_path, "a/val/0000.parquet")
    with pytest.raises(UsageError, match="2 splits"):
        find_files(str(tmp_path))
    touch(tmp_path / "b", "data/train.jsonl", "data/validation.jsonl")
    with pytest.raises(UsageError, match="2 splits"):
        find_files(str(tmp_path / "b"))


def test_what_describes_json_is_no_json(tmp_path):
    touch(tmp_path, "rows.jsonl", "dataset_info.json", "00000_stats.json")
    assert names(tmp_path) == ["rows.jsonl"]


def test_several_formats_in_one_folder_are_refused(tmp_path):
    touch(tmp_path, "rows.json", "images.tar")
    with pytest.raises(UsageError, match=r"several formats \(images.tar, rows.json\)"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.csv", "a table of texts has no conversations: write one row for each sample as .jsonl or .parquet"),
        ("a.TSV", "a table of texts"),
        ("a.tar.gz", "unpack it to a .tar"),
        ("a.zip", "unpack it, and name the data file"),
        ("a.jsonl.zst", "compress it with gzip"),
        ("a.tfrecord", "write one row for each sample"),
    ],
)
def test_other_formats_are_refused_with_the_way_forward(tmp_path, name, way):
    touch(tmp_path, name)
    with pytest.raises(DataFormatError, match=f"{name}: unknown format; expected one of .*{way}"):
        Dataset(str(tmp_path / name))


@pytest.mark.parametrize("url", ["https://x.org/a.parquet", "HTTP://x/a.json", "s3://bucket/a", "hf://datasets/a/b"])
def test_urls_say_that_nothing_is_downloaded(url):
    assert absolute_data(url) == url
    with pytest.raises(UsageError, match="nothing is downloaded; .*hf download --repo-type dataset NAME"):
        Dataset(url)


# ---- the hub's local caches


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty home of the hub's caches. The constants are read when huggingface_hub is imported."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


def test_a_name_in_the_hubs_cache(hub, tmp_path):
    """As hf download leaves it: snapshots of links into blobs, and the revision that is main."""
    repository, commit = hub / "hub" / "datasets--some--data", "0" * 40
    folder = repository / "snapshots" / commit
    tiny.write_data(repository / "blobs" / "abc")
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00001.parquet").symlink_to("../../../blobs/abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    dataset = Dataset("some/data")
    assert dataset.n_rows == 6
    assert absolute_data("some/data") == "some/data"
    with pytest.raises(InputNotFoundError, match="no data at other/data: .*hf download --repo-type dataset NAME"):
        Dataset("other/data")
    assert absolute_data("other/data") == str(Path("other/data").absolute())


def test_a_name_in_the_cache_of_datasets(hub, tmp_path):
    folder = hub / "datasets" / "some___data" / "default" / "0.0.0" / "fingerprint"
    folder.mkdir(parents=True)
    table = pq.read_table(tiny.write_data(tmp_path / "rows.parquet"))
    for name in ("data-train-00000-of-00002", "data-train-00001-of-00002", "cache-0123"):
        with pa.ipc.new_stream(folder / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    assert Dataset("some/data").n_rows == 12
    with pa.ipc.new_stream(folder / "data-test.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UsageError, match=r"2 splits; .*data-test\*.arrow"):
        Dataset("some/data")


def test_nothing_of_a_saved_data_set_is_guessed(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}], "_indices_files": [1]}))
    with pytest.raises(DataFormatError, match="save it again after `flatten_indices"):
        find_files(str(tmp_path))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataFormatError, match="state.json is not that of `save_to_disk`"):
        find_files(str(tmp_path))
