"""One sample's affinity, words and widths, against loops over the record."""

import io
import json

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from emkd.inspection import inspect_cache, render
from emkd.inspection.terminal.sample import colour, label, word_columns
from emkd.text import printable
from tests.inspection.made import WORDS, one_sample, span
from tests.storage.builders import V


def shown(report, width=80, **options):
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True, **options)
    render(report, console)
    return console.file.getvalue().splitlines()


def heat_maps(lines):
    """The cells of each heat map: neighbouring lines with borders."""
    maps, inside = [], False
    for line in lines:
        if "│" in line:
            maps.append([] if not inside else maps.pop())
            maps[-1].append(line.split("│")[1])
        inside = "│" in line
    return maps


def shade(value, low, high):
    for step, character in enumerate(" ░▒▓"):
        if value < low + (high - low) * (step + 1) / 5:
            return character
    return "█"


def means(record, images, each):
    """Naive: mean of `each` neighbouring tokens' affinity, for each image and text token."""
    return [
        [
            [float(np.mean(row[at : min(at + each, end)])) for at in range(start, end, each)]
            for row in record.affinity.astype(np.float64)
        ]
        for start, end in ((image.start, image.start + image.count) for image in images)
    ]


def test_affinity_is_binned_for_each_image(tmp_path):
    images = [span(0, 130, ((10, 13),)), span(130, 128, ())]
    record = one_sample(tmp_path / "c", images, n_text=9)
    report = json.loads(json.dumps(inspect_cache(tmp_path / "c", sample="it")))
    first, second = (image["affinity"] for image in report["images"])
    assert (first["n_tokens"], first["tokens_per_column"], first["n_columns"]) == (130, 3, 44)
    assert (second["n_tokens"], second["tokens_per_column"], second["n_columns"]) == (128, 2, 64)
    for affinity, image, each in ((first, images[0], 3), (second, images[1], 2)):
        (expected,) = means(record, [image], each)
        assert [row["values"] for row in affinity["rows"]] == [
            [pytest.approx(v, abs=6e-4) for v in e] for e in expected
        ]
        cosines = record.affinity[:, image.start : image.start + image.count]
        assert affinity["range"] == [round(float(cosines.min()), 3), round(float(cosines.max()), 3)]
        assert all(len(str(abs(v))) <= 5 for row in affinity["rows"] for v in row["values"])  # 0.123
    for position, row in enumerate(first["rows"]):
        word = WORDS[record.text_ids[position]]
        assert (row["position"], row["token"]) == (position, word.strip() or f"#{record.text_ids[position]}")
        assert row["answer"] == (position in record.answer_positions)
    assert sum(row["answer"] for row in first["rows"]) == 2
    expected = record.affinity[record.answer_positions, :130].mean(axis=0).reshape(10, 13)
    np.testing.assert_allclose(first["answer_grid"], [expected], atol=6e-4)
    assert second["answer_grid"] == []


def test_long_samples_show_the_answer_and_rows_between(tmp_path):
    positions = np.arange(90, 110, dtype=np.int32)
    one_sample(tmp_path / "c", [span(0, 6, ())], n_text=120, n_answer=20, answer_positions=positions)
    report = inspect_cache(tmp_path / "c", sample="it")
    rows = report["images"][0]["affinity"]["rows"]
    assert len(rows) == 40
    assert [row["position"] for row in rows if row["answer"]] == list(range(90, 110))
    lines = shown(report)
    assert "40 of 120 text tokens; answers are marked >" in lines
    assert sum(line.startswith("> ") for line in lines) == 20


def test_the_terminal_shows_the_same_map(tmp_path):
    """Shades by a loop, over what is drawn: one scale for all images, one for the answers' maps."""
    images = [span(0, 12, ((3, 4),)), span(12, 20, ((2, 5), (5, 2)), 2)]
    record = one_sample(tmp_path / "c", images)
    lines = shown(inspect_cache(tmp_path / "c", sample="it"))
    maps = heat_maps(lines)
    assert [len(each) for each in maps] == [3, 6, 2, 5, 6]
    grids = [maps[0], maps[2], maps[3]]
    affinity = record.affinity.astype(np.float64).round(3)
    low, high = affinity.min(), affinity.max()
    assert sum(f"from {low:.2f} (blank) to {high:.2f} (█), one vision token a column" in line for line in lines) == 2
    drawn = [["".join(shade(v, low, high) * 2 for v in row[a:b]) for row in affinity] for a, b in ((0, 12), (12, 32))]
    assert [maps[1], maps[4]] == drawn
    answers = record.affinity[record.answer_positions].astype(np.float64).mean(axis=0).round(3)
    low, high = answers.min(), answers.max()
    assert sum(f"from {low:.2f} (blank) to {high:.2f} (█), mean of the answer tokens" in line for line in lines) == 3
    cells = "".join(cell for grid in grids for line in grid for cell in line[::2])
    assert cells == "".join(shade(v, low, high) for v in answers)
    marks = [line[0] for line in lines if line[:1] in "> " and line.endswith("│") and not line.startswith("│")]
    assert marks == [">" if i in record.answer_positions else " " for i in range(6)] * 2


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_wider_than_the_terminal(tmp_path, width):
    images = [span(0, 576, ((24, 24),)), span(576, 50, ()), span(626, 27 * 27, ((27, 27),))]
    one_sample(tmp_path / "c", images, n_text=20)
    lines = shown(inspect_cache(tmp_path / "c", sample="it"), width)
    images_at = lines.index("image 0  336 x 448, likeliest words:")
    for line in lines[images_at:]:
        if width >= 80 or not line.startswith(("affinity", "20 of 20", "image")):
            assert cell_len(line) <= width
    maps = [each for each in heat_maps(lines) if len(each) == 20]
    fit = {40: 25, 80: 64, 200: 64}[width]
    for each, n in zip(maps, (576, 50, 729), strict=True):
        n_columns = -(-n // -(-n // 64))  # of the report
        columns = -(-n_columns // -(-n_columns // fit))
        assert {len(line) for line in each} == {columns * (2 if 2 * columns <= width - 15 else 1)}


def test_words_of_a_wide_grid_in_parts():
    assert word_columns(4, 80) == (4, 9)
    assert word_columns(10, 80) == (10, 7)  # shorter words before parts
    assert word_columns(24, 80) == (8, 9)
    assert word_columns(24, 200) == (24, 7)
    assert word_columns(27, 80) == (9, 8)
    for n in range(1, 80):
        for terminal in (10, 80, 200):
            columns, width = word_columns(n, terminal)
            assert columns * (width + 1) - 1 <= terminal
            assert width >= 6


def test_every_word_of_a_wide_grid_is_there(tmp_path):
    """Parts of a grid put together again are the grid."""
    record = one_sample(tmp_path / "c", [span(0, 30 * 3, ((3, 30),))], affinity=np.zeros((6, 90), np.float32))
    lines = shown(inspect_cache(tmp_path / "c", sample="it"), 80)
    heads = [i for i, line in enumerate(lines) if line.startswith("columns ")]
    assert [lines[i] for i in heads] == [f"columns {a} to {a + 9} of 30" for a in (0, 10, 20)]
    found = [[word for i in heads for word in lines[i + 1 + r].split()] for r in range(3)]
    for r in range(3):
        for word, token in zip(found[r], record.vision.ids[30 * r : 30 * r + 30, 0], strict=True):
            full = printable(WORDS[token].strip() or f"#{token}")
            assert full.startswith(word)
            assert word == full or cell_len(word) in (6, 7)


def test_colours_only_on_a_colour_terminal(tmp_path):
    one_sample(tmp_path / "c", [span(0, 12, ((3, 4),))])
    report = inspect_cache(tmp_path / "c", sample="it")
    plain = shown(report)
    assert "\x1b" not in "\n".join(plain)
    coloured = "\n".join(shown(report, force_terminal=True, color_system="truecolor", legacy_windows=False))
    assert "48;2;68;1;84m" in coloured  # the background of the smallest value
    assert "48;2;253;231;37m" in coloured  # and of the largest
    brightness = [sum(colour(level).bgcolor.triplet) for level in range(16)]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize(
    "word", ["猫が見えます今日は", "a猫が見えます", "incomprehensibilities", "é", "", "x\x1b[31m\n"]
)
def test_labels_are_of_one_width(word):
    assert cell_len(label(word)) == 10
    assert label(word).isprintable()


def test_what_commands_a_terminal_is_not_printed(tmp_path):
    """Words with markup, an emoji's name, an escape sequence and a line end stay what they are, in one line."""
    text = np.arange(6, dtype=np.int32)
    one_sample(tmp_path / "c", [span(0, 12, ())], n_text=6, text_ids=text, row_id=":dog: [bold]\x1b[0m")
    lines = shown(inspect_cache(tmp_path / "c", sample=":dog: [bold]\x1b[0m"))
    assert not any("\x1b" in line for line in lines)
    assert lines[1] == "row 0, id :dog: [bold]·[0m, shard 0"
    assert any(line.endswith(" a      b x·[31mred [bold] :dog:") for line in lines)
    labels = [line[2:].split("│")[0].strip() for line in lines if line.endswith("│")]
    assert labels == ["猫が見えま", "#1", "a·b", "x·[31mred", "[bold]", ":dog:"]


def test_one_logit_is_enough(tmp_path):
    record = one_sample(tmp_path / "c", [span(0, 4, ((2, 2),))], top_k=1)
    report = inspect_cache(tmp_path / "c", sample="it")
    words = [WORDS[token].strip() or f"#{token}" for token in record.vision.ids[:, 0]]
    assert report["images"][0]["words"] == [[words[:2], words[2:]]]
    assert len(heat_maps(shown(report))) == 2


def test_a_sample_without_images(tmp_path):
    one_sample(tmp_path / "c", [])
    report = inspect_cache(tmp_path / "c", sample="it")
    assert report["images"] == []
    assert heat_maps(shown(report)) == []


def test_images_without_tokens_and_grids_that_do_not_fit(tmp_path):
    """The second image's grid is of fewer tokens than it has: its words are shown in one line, without a grid."""
    one_sample(tmp_path / "c", [span(0, 0, ()), span(0, 7, ((2, 3),), 2)])
    report = inspect_cache(tmp_path / "c", sample="it")
    empty, other = report["images"]
    assert (empty["words"], empty["affinity"]) == ([[[]]], None)
    assert [len(row) for row in other["words"][0]] == [7]
    assert other["affinity"]["answer_grid"] == []
    lines = shown(report, 40)
    assert len(heat_maps(lines)) == 1
    assert not any(line.startswith("columns") for line in lines)  # there are none: the line continues below


def test_a_flat_affinity_is_blank(tmp_path):
    one_sample(tmp_path / "c", [span(0, 4, ((2, 2),))], affinity=np.full((6, 4), 0.5, np.float32))
    report = inspect_cache(tmp_path / "c", sample="it")
    assert report["images"][0]["affinity"]["range"] == [0.5, 0.5]
    assert {cell for each in heat_maps(shown(report)) for line in each for cell in line} == {" "}


def test_the_words_are_of_the_vocabulary():
    assert len(WORDS) == V
