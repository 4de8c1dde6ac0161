"""The demonstration says something at least every few seconds."""

import time

import pytest

from emkd.demo import progress
from emkd.trainer import report


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.2)
    yield
    report.send_to(report._to_stderr)


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_silent_phase_says_that_it_goes_on(capsys):
    seconds: dict[str, float] = {}
    with progress.timed(seconds, "work", "working"):
        time.sleep(0.8)
    found = lines(capsys)
    assert found[0] == "working"
    assert found[-1] == f"working: {seconds['work']} s"
    assert 2 <= sum("so far" in line for line in found) <= 4
    time.sleep(0.5)
    assert not lines(capsys), "nothing is said after its end"


def test_a_phase_that_speaks_is_not_interrupted(capsys):
    with progress.timed({}, "work", "working"):
        for _ in range(8):
            progress.say("a step")
            time.sleep(0.08)
    assert not any("so far" in line for line in lines(capsys))


def test_lines_of_training_count(capsys):
    with progress.timed({}, "work", "working"):
        for step in range(8):
            report.log(f"step {step}")
            time.sleep(0.08)
    found = lines(capsys)
    assert "step 7" in found
    assert not any("so far" in line for line in found)


def test_a_failing_phase_ends_its_thread(capsys):
    with pytest.raises(ZeroDivisionError), progress.timed({}, "work", "working"):
        1 / 0  # noqa: B018
    lines(capsys)
    time.sleep(0.5)
    assert not lines(capsys)


def test_steps_are_said_now_and_then_and_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 4.0)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    steps = progress.Steps()
    for step in range(1, 21):
        now[0] += 0.5
        steps("tower", step, 20)
    assert lines(capsys) == [f"  tower: step {step}/20" for step in (6, 12, 18, 20)]
