"""What a running job logs: totals, rates, and plain lines without a terminal."""

import pytest

from emkd.pipeline import progress as module
from emkd.pipeline.progress import JobProgress, progress
from emkd.pipeline.worker import ShardReport
from emkd.units import size_text, time_text


def report(**chosen) -> ShardReport:
    given = {
        "number": 0,
        "committed": True,
        "n_samples": 8,
        "n_skipped": 2,
        "n_halved": 0,
        "n_shared": 0,
        "n_different": 0,
        "n_bytes": 1500,
        "seconds": 1.0,
    }
    return ShardReport(**{**given, **chosen})


def test_rows_rate_time_left_bytes_and_skipped_rows():
    totals = JobProgress(n_shards=4, n_rows=40, started=100.0)
    totals.add(report())
    assert totals.describe(now=105.0) == "10 of 40 rows, 2 rows/s, 15 s left, 1.5 kB, 2 skipped"
    totals.add(report(n_skipped=0, n_halved=3, n_shared=5, n_different=1))
    assert totals.describe(now=105.0) == (
        "18 of 40 rows, 3.6 rows/s, 6 s left, 3 kB, 2 skipped, 3 in batches halved for lack of memory: try a smaller "
        "--batch-tokens, 5 images shared with other rows, 1 images not shared although they follow the same text: this "
        "teacher's vision tokens depend on more than that"
    )
    assert totals.shards == 2


def test_before_the_first_row_nothing_is_divided_by():
    assert (
        JobProgress(n_shards=4, n_rows=40, started=100.0)
        .describe(now=100.0)
        .startswith("0 of 40 rows, 0 rows/s, 0 s left")
    )


def test_without_a_terminal_lines_are_rare_and_the_last_one_is_there(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress(n_shards=5, n_rows=50) as show:
        for seconds in (1.0, 2.0, 6.1, 6.2, 6.3):
            now[0] = seconds
            show(report())
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["1 of 5 shards", "3 of 5 shards", "5 of 5 shards"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (185, "3 min 5 s"), (5 * 3600 + 720, "5 h 12 min"), (76 * 3600, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(999, "999 bytes"), (1000, "1 kB"), (1234567, "1.23 MB"), (5e9, "5 GB"), (2.5e12, "2.5 TB")]
)
def test_sizes(n_bytes, text):
    assert size_text(n_bytes) == text
