"""Scenes: which pool shows which digits, what a file holds, and that the seed decides everything."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emkd.demo.scenes import (
    ANSWERS,
    EMPTY,
    POOLS,
    QUESTIONS,
    draw_scenes,
    file_scenes,
    fresh_scenes,
    pool_digits,
    write_scenes,
)
from emkd.errors import UsageError


def answers_of(path):
    """[n, q] answer words of a file."""
    rows = pq.read_table(path)["messages"].to_pylist()
    return np.array([[turn["content"] for turn in messages[1::2]] for messages in rows])


def test_pools_share_no_digit_image():
    indices = {name: set(range(1797)[part]) for name, part in POOLS.items()}
    assert {name: len(members) for name, members in indices.items()} == {
        "train": 1200,
        "validation": 200,
        "test": 397,
    }
    assert len(set.union(*indices.values())) == 1797
    digits = {name: {image.tobytes() for image in pool_digits(name)[0]} for name in POOLS}
    assert digits["train"].isdisjoint(digits["validation"] | digits["test"])
    assert digits["validation"].isdisjoint(digits["test"])


@pytest.mark.parametrize("pool", POOLS)
def test_each_pool_has_every_digit(pool):
    assert set(pool_digits(pool)[1]) == set(range(10))


def test_unknown_pool_is_refused():
    with pytest.raises(UsageError, match="'trian'; expected one of train, validation, test"):
        draw_scenes(np.random.default_rng(0), 1, "trian")


def test_scene_shows_its_labels():
    """Each cell correlates with a digit of its label, at one of the nine offsets; empty cells are dark."""
    scenes = draw_scenes(np.random.default_rng(1), 5, "validation")
    pixels, labels = pool_digits("validation")
    for image, of_cells in zip(scenes.images, scenes.labels, strict=True):
        cells = image[..., 0].reshape(2, 10, 4, 10).transpose(0, 2, 1, 3).reshape(8, 10, 10) / 255
        for cell, label in zip(cells, of_cells, strict=True):
            if label == EMPTY:
                assert cell.max() < 0.5
                continue
            windows = [cell[r : r + 8, c : c + 8].ravel() for r in range(3) for c in range(3)]
            same = pixels[labels == label].reshape(-1, 64)
            assert np.corrcoef(windows, same)[:9, 9:].max() > 0.9


def test_statistics_of_scenes():
    scenes = draw_scenes(np.random.default_rng(2), 1000, "train")
    assert scenes.images.shape == (1000, 20, 40, 3)
    assert scenes.images.dtype == np.uint8
    assert (scenes.images == scenes.images[..., :1]).all()
    assert (scenes.labels == EMPTY).mean() == pytest.approx(0.25, abs=0.02)
    assert (np.sort(scenes.order, axis=1) == np.arange(8)).all()
    assert len(np.unique(scenes.order[:, 0])) == 8
    assert len(scenes[10:30]) == 20


def test_questions_name_columns_and_rows():
    assert QUESTIONS == ("a1?", "b1?", "c1?", "d1?", "a2?", "b2?", "c2?", "d2?")
    assert len(set(QUESTIONS) | set(ANSWERS)) == 19


def test_fresh_scenes_differ_from_batch_to_batch_and_repeat_with_the_seed():
    one, again, other = (fresh_scenes("train", 3, seed) for seed in (0, 0, 1))
    first, second = next(one), next(one)
    assert not np.array_equal(first.images, second.images)
    assert np.array_equal(next(again).images, first.images)
    assert np.array_equal(next(again).images, second.images)
    assert not np.array_equal(next(other).images, first.images)


def test_file_has_the_documented_columns(tmp_path):
    table = pq.read_table(write_scenes(tmp_path / "data" / "train.parquet", 3, "train", seed=0))
    assert table.schema.names == ["id", "images", "messages"]
    assert table.schema.field("id").type == pa.string()
    assert table.schema.field("images").type.value_type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("messages").type.value_type == pa.struct(
        [("role", pa.string()), ("content", pa.string())]
    )
    assert table["id"].to_pylist() == ["train-00000", "train-00001", "train-00002"]


def test_file_holds_the_scenes_it_is_drawn_from(tmp_path):
    path = write_scenes(tmp_path / "test.parquet", 4, "test", seed=7)
    scenes = file_scenes(4, "test", seed=7)
    for number, row in enumerate(pq.read_table(path).to_pylist()):
        (image,) = row["images"]
        assert image["path"] is None
        decoded = Image.open(io.BytesIO(image["bytes"]))
        assert (decoded.format, decoded.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(decoded), scenes.images[number])
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 8
        asked = [turn["content"] for turn in row["messages"][::2]]
        assert asked == ["<image>" * (t == 0) + QUESTIONS[cell] for t, cell in enumerate(scenes.order[number])]
    assert answers_of(path).tolist() == [[ANSWERS[label] for label in answers] for answers in scenes.answers]


def test_same_seed_same_bytes(tmp_path):
    paths = [
        write_scenes(tmp_path / f"{n}.parquet", 4, "train", seed=seed, wrong_answers=0.25)
        for n, seed in enumerate((5, 5, 6))
    ]
    one, again, other = (path.read_bytes() for path in paths)
    assert one == again
    assert one != other


def test_a_quarter_of_the_answers_is_wrong_when_asked(tmp_path):
    right = answers_of(write_scenes(tmp_path / "right.parquet", 200, "train", seed=3))
    wrong = answers_of(write_scenes(tmp_path / "wrong.parquet", 200, "train", seed=3, wrong_answers=0.25))
    assert (right != wrong).sum() == 400
    assert set(wrong.ravel()) == set(ANSWERS)
    indices = (np.searchsorted(np.sort(ANSWERS), words) for words in (right, wrong))
    moved = np.subtract(*indices)[right != wrong] % 11
    assert (np.bincount(moved, minlength=11)[1:] > 20).all()  # 40 of each expected

    columns = pq.read_table(tmp_path / "right.parquet"), pq.read_table(tmp_path / "wrong.parquet")
    assert columns[0]["images"] == columns[1]["images"]


def test_fewer_questions_are_the_first_ones_of_the_same_scenes(tmp_path):
    whole = pq.read_table(write_scenes(tmp_path / "whole.parquet", 5, "train", seed=3)).to_pylist()
    short = pq.read_table(write_scenes(tmp_path / "short.parquet", 5, "train", seed=3, questions=1)).to_pylist()
    assert [row["messages"] for row in short] == [row["messages"][:2] for row in whole]
    assert [row["images"] for row in short] == [row["images"] for row in whole]
    wrong = answers_of(write_scenes(tmp_path / "wrong.parquet", 400, "train", seed=3, questions=1, wrong_answers=0.25))
    right = answers_of(write_scenes(tmp_path / "right.parquet", 400, "train", seed=3, questions=1))
    assert wrong.shape == (400, 1)
    assert (wrong != right).sum() == 100


@pytest.mark.parametrize(
    ("n", "questions", "share"), [(0, 8, 0.0), (1, 8, -0.1), (1, 8, 1.1), (1, 0, 0.0), (1, 9, 0.0)]
)
def test_impossible_files_are_refused(tmp_path, n, questions, share):
    with pytest.raises(UsageError, match="at least 1 scene"):
        write_scenes(tmp_path / "x.parquet", n, "train", seed=0, questions=questions, wrong_answers=share)
    assert not list(tmp_path.iterdir())
