"""What a run shows: a table and a bar that fit the terminal, plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from emkd.trainer import report
from emkd.trainer.display import Forward, Lines, Position, Terminal, columns_for

NUMBERS = {
    "loss": 4.4189, "grad_norm": 9.3, "learning_rate": 2e-5, "sup": 4.6, "rld": 1.665, "vsd": 1.183, "vlad": 0.06048,
    "matched_pairs": 10.0, "retained_mass": 1.0, "assignment_share": 0.03, "waiting_share": 0.1914,
    "samples_per_second": 33.34, "epoch": 1.3,
}  # fmt: skip
HALF = Position(step=1200, n_steps=3000, seconds=0.5, loss=4.4189, waiting=0.19)


def shown(width, n=1):
    """What a terminal of this width has after n logs and the bar."""
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=width, force_terminal=True, color_system=None))
    for step in range(n):
        terminal.numbers(25 * (step + 1), 3000, NUMBERS)
    terminal.position(HALF)
    terminal.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in plain.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_row_is_wider_than_the_terminal(width):
    lines = shown(width, n=3)
    assert all(len(line) <= width for line in lines), lines
    header, *rows = lines[:4]
    assert header.split()[:2] == ["step", "loss"]
    assert [row.split()[:2] for row in rows] == [["25", "4.419"], ["50", "4.419"], ["75", "4.419"]]
    assert any(line.startswith("step 1200/3000") and "15 min 0 s left" in line for line in lines), lines


def test_wide_has_more_than_narrow():
    titles = [[column.title for column in columns_for(NUMBERS, width)] for width in (60, 80, 120)]
    assert titles[0] == ["loss", "sup", "rld", "vsd", "vlad", "rate"]
    assert titles[1] == [*titles[0], "wait", "samples/s"]
    assert titles[2][-3:] == ["gradient", "pairs", "mass"]
    assert "sup" not in [column.title for column in columns_for({"loss": 1.0, "learning_rate": 1.0}, 80)]


def test_a_position_has_what_fits_the_most_useful_first():
    assert HALF.text(100) == "15 min 0 s left, 0.5 s/step, loss 4.419, waiting 19%"
    assert HALF.text(30) == "15 min 0 s left, 0.5 s/step"
    assert HALF.text(3) == ""
    assert Position(step=0, n_steps=9).text(100) == ""


def test_lines_have_every_number():
    said = []
    Lines(said.append).numbers(25, 3000, NUMBERS)
    (line,) = said
    assert line.startswith("step 25/3000: loss 4.419, grad_norm 9.3, ")
    assert all(f"{name} " in line for name in NUMBERS)


def test_what_a_worker_forwards_is_shown_by_the_driver(monkeypatch):
    sent, said = [], []
    worker = Forward(sent.append)
    worker.line("training")
    worker.numbers(1, 2, {"loss": 1.0})
    worker.position(HALF)
    monkeypatch.setattr(report, "_display", Lines(said.append))
    for item in [*sent, "a plain line"]:
        report.deliver(item)
    assert said == ["training", "step 1/2: loss 1", "a plain line"]


def test_quiet_and_back(monkeypatch):
    said = []
    monkeypatch.setattr(report, "_display", Lines(said.append))
    with report.quiet():
        report.tell("not this")
    report.tell("this")
    assert said == ["this"]
