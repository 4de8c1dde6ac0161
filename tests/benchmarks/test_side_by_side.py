"""benchmarks/storage/side_by_side.py on a golden cache, with this checkout as the old and the new one."""

from pathlib import Path

import pytest

from benchmarks.storage.side_by_side import race, read, summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "tests" / "storage" / "golden" / "v3"


def test_both_checkouts_are_read_in_alternating_order():
    runs = race({"old": ROOT, "new": ROOT}, CACHE, rounds=1, epochs=2)
    assert {name: len(repeats) for name, repeats in runs.items()} == {"old": 2, "new": 2}
    assert all(rate > 0 for repeats in runs.values() for one in repeats for rate in one.values())


def test_another_emkd_than_the_checkouts_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=f"expected {tmp_path}"):
        read(tmp_path, CACHE, epochs=1)


def test_ratios_are_of_medians():
    runs = {"old": [{"samples_per_s": s} for s in (1.0, 4.0, 2.0)], "new": [{"samples_per_s": 3.0}]}
    assert summary(runs) == {
        "median": {"old": {"samples_per_s": 2.0}, "new": {"samples_per_s": 3.0}},
        "ratio": {"samples_per_s": 1.5},
    }
