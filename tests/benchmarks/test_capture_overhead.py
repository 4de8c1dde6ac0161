"""benchmarks/storage/capture_overhead.py at a size that takes seconds: the functions that measure the real sizes."""

from pathlib import Path

import pytest
import torch

from benchmarks.storage import capture_overhead as capture
from emkd.pipeline.capture import MEASURED_VISION

pytestmark = pytest.mark.slow


def test_both_ways_are_measured_over_the_same_batches(tmp_path: Path) -> None:
    """Forward passes and logits of the bare loop have the shapes of the worker's."""
    ways = capture.Ways(capture.CASES["tiny"], tmp_path, "cpu")
    model, seen = ways.teacher.vlm.model, []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(("pass", *kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(("head", *args[0].shape)))
    ways.bare(0)
    bare = list(seen)
    seen.clear()
    ways.worker(0)
    measuring = (("head", MEASURED_VISION), ("head", 1))  # the error of codes, on a few tokens of each row
    assert [entry for entry in seen if entry[:2] not in measuring] == bare
    assert len(seen) > len(bare)
    assert [entry[0] for entry in bare] == ["pass", *["head"] * 8]


def test_the_result_has_ratios_and_raw_repeats() -> None:
    found = capture.measure_case("tiny", "cpu")
    assert {way: len(runs) for way, runs in found["runs"].items()} == {"bare": 3, "worker": 3}
    assert all(run["seconds"] > 0 for runs in found["runs"].values() for run in runs)
    assert found["median"]["bare"]["seconds"] == sorted(run["seconds"] for run in found["runs"]["bare"])[1]
    result = {"cases": {"tiny": found, "gpu": capture.NOT_MEASURED}, "encode_ms": 1.25}
    assert "gpu | not measured" in capture.show(result)
    assert torch.get_num_threads() == 1
