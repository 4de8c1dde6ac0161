"""The parts of benchmarks/lm_demo.py that need no language model: pictures, rows, what tokens show, recipe and table."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

import benchmarks.lm_demo as script
from benchmarks.lm.demo import report, students
from benchmarks.lm.demo.accuracy import accuracy_on
from benchmarks.lm.demo.lookup import draw_rows, embedded
from benchmarks.lm.demo.scenes import (
    CELL_PIXELS,
    CELLS,
    PADDING,
    WORDS,
    conversation,
    draw_scenes,
    file_scenes,
    write_scenes,
)
from benchmarks.lm.demo.sizes import SIZES
from benchmarks.lm.demo.training import CELL_SHARE, RECENT, TURN, optimise, parsed
from benchmarks.lm.language_model import clean
from emkd.demo.models import new_processor, new_teacher, save_model
from emkd.demo.scenes import write_scenes as write_digits
from emkd.trainer import evaluate_checkpoint, make_recipe


def test_a_scene_is_a_function_of_its_seed_and_splits_differ():
    assert (file_scenes(2, "test").images == file_scenes(2, "test").images).all()
    assert (file_scenes(2, "test").images != file_scenes(2, "validation").images).any()


def test_each_cell_holds_its_own_word_and_nothing_lies_outside_of_it():
    scenes = draw_scenes(np.random.default_rng(0), 40)
    assert scenes.images.shape == (40, 64, 128, 3)
    assert set(scenes.labels.ravel()) == set(range(len(WORDS)))
    cells = scenes.images[..., 0].reshape(40, 2, CELL_PIXELS, 4, CELL_PIXELS).transpose(0, 1, 3, 2, 4)
    middles = cells[..., 8:-8, :].mean(axis=(3, 4))
    assert (middles > 1.5 * cells[..., :4, :].mean(axis=(3, 4))).all()


def test_what_vision_tokens_show():
    scenes = draw_scenes(np.random.default_rng(0), 1)
    padded = students.shown(scenes, pads=True).contents.reshape(8, 8)
    assert (padded[[0, 1, 6, 7]] == PADDING).all()
    assert (padded[2:6:2, ::2].ravel() == scenes.labels[0]).all()
    assert (padded[3:6:2, 1::2].ravel() == scenes.labels[0]).all()
    pooled = students.shown(scenes, pads=False, pool=2).contents.reshape(4, 4)
    assert (pooled[::2].ravel() == scenes.labels[0]).all()
    assert (pooled[1::2].ravel() == scenes.labels[0]).all()


def test_rows_ask_for_cells_and_answer_with_their_words(tmp_path):
    path = tmp_path / "data" / "train.parquet"
    write_scenes(path, 3, "train")
    rows, scenes = pq.read_table(path).to_pylist(), file_scenes(3, "train")
    for row, labels in zip(rows, scenes.labels, strict=True):
        turns = row["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 8
        assert turns[0]["content"].startswith("<image>Read ")
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            cell = CELLS.index(question["content"].split()[-1])
            assert answer["content"] == WORDS[labels[cell]]
    image = np.asarray(Image.open(io.BytesIO(rows[1]["images"][0]["bytes"])))
    assert (image == scenes.images[1]).all()


def test_a_quarter_of_the_answers_is_wrong_and_nothing_else_changes(tmp_path):
    write_scenes(tmp_path / "right.parquet", 40, "train", questions=1)
    write_scenes(tmp_path / "wrong.parquet", 40, "train", questions=1, wrong_answers=0.25)
    right, wrong = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("right", "wrong"))
    pairs = [(a["messages"], b["messages"]) for a, b in zip(right, wrong, strict=True)]
    assert sum(a[1] != b[1] for a, b in pairs) == 10
    assert all(a[0] == b[0] for a, b in pairs)


def test_the_picture_is_a_part_of_the_first_message():
    messages = parsed(conversation(np.array([5, 0]), np.array([1, 2])))
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert messages[0]["content"][1]["text"] == "Read f"
    assert [part["type"] for part in messages[2]["content"]] == ["text"]


@pytest.mark.parametrize("size", SIZES)
def test_recipes_are_valid_and_variants_are_known(size):
    for phase in (0, 1):
        make_recipe(students.recipe(SIZES[size], phase), "test")
    assert tuple(students.VARIANTS) == script.VARIANTS
    assert set(report.NAMES) == set(script.VARIANTS)


def test_the_table_says_what_was_not_run_and_what_is_not_the_whole_model():
    found = {
        "gpu": "not run",
        "split": "test",
        "teacher": 0.9,
        "student-init": 0.5,
        "students": {"rld": [0.6, 0.7], "emkd": [0.7, 0.7]},
        "pairs": {"random": {"content": 0.1, "place": 0.1}},
        "cache": {"bytes_per_vision_token": 100.0},
        "seconds": {"teacher": 1.0},
        "processor_seconds": {"teacher": 0.5},
    }
    printed = report.table(found, SIZES["cpu"].describe())
    assert "GPU: not run" in printed
    assert "the first 2 of 30 layers" in printed
    assert "emkd - rld: +5.0 points ± 5.0" in printed
    assert "DOES NOT READ" not in printed
    assert "DOES NOT READ" in report.table(found | {"teacher": 0.1}, "")
    assert "all 30 layers" in SIZES["gpu"].describe()


def test_accuracy_on_a_device_is_that_of_evaluate_checkpoint(tmp_path):
    save_model(new_teacher(0), new_processor(pads=True), tmp_path / "model")
    write_digits(tmp_path / "data.parquet", 40, "test", 0)
    found = accuracy_on("cpu", tmp_path / "model", tmp_path / "data.parquet")
    assert found == evaluate_checkpoint(str(tmp_path / "model"), str(tmp_path / "data.parquet"))["accuracy"]


def test_a_lookup_shows_each_cell_as_its_word_and_letter_and_asks_for_cells_that_it_shows():
    rows = draw_rows(np.random.default_rng(0), 5, 4)
    words, cells, read = torch.arange(len(WORDS)), len(WORDS) + torch.arange(len(CELLS)), len(WORDS) + len(CELLS)
    one_hot = torch.nn.Embedding.from_pretrained(torch.eye(read + 1))
    found = embedded(rows, one_hot, words, cells, read)
    assert found.shape == (5, 4 + TURN * 4, read + 1)
    for row in range(5):
        for cell in range(4):
            expected = torch.zeros(read + 1)
            expected[rows.labels[row, cell]] = 1.0
            expected[len(WORDS) + rows.cells[row, cell]] = CELL_SHARE
            torch.testing.assert_close(found[row, cell], expected)
        for turn, column in enumerate(rows.asked[row]):
            ids = found[row, 4 + TURN * turn : 4 + TURN * (turn + 1)].argmax(dim=1).tolist()
            assert ids == [read, len(WORDS) + rows.cells[row, column], rows.labels[row, column]]
    assert (rows.answers == [labels[asked] for labels, asked in zip(rows.labels, rows.asked, strict=True)]).all()
    assert all(len(set(each)) == 4 for each in rows.cells.tolist())


def test_training_stops_when_the_loss_is_learnt():
    weight = torch.nn.Parameter(torch.ones(1))
    losses = optimise([weight], lambda: (weight**2).sum(), 100, 0.1, "test", learnt=0.5)
    assert RECENT <= len(losses) < 100
    assert np.mean(losses[-RECENT:]) < 0.5
    assert len(optimise([weight], lambda: (weight**2).sum(), 10, 0.1, "test")) == 10


def test_a_saved_configuration_holds_no_path_and_is_not_quantised(tmp_path):
    config = LlamaConfig(quantization_config={"quant_method": "gguf"})
    config._name_or_path = str(tmp_path)
    clean(config)
    config.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert str(tmp_path) not in saved
    assert "quant" not in saved
