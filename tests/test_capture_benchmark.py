"""benchmarks/capture.py at a size that takes seconds: the same functions that measure the real sizes."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("capture", "encode_time", "cases", "random_llava", "synthetic", "provenance")


@pytest.fixture(scope="module")
def capture() -> Iterator[ModuleType]:
    """The script, which finds the modules beside it as Python finds them for a script."""
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("capture")
    sys.path.remove(str(BENCHMARKS))
    for name in NAMES:
        sys.modules.pop(name, None)


def test_both_ways_are_measured_over_the_same_batches(capture: ModuleType, tmp_path: Path) -> None:
    """Forward passes and logits of the bare loop are those of the worker, shape by shape."""
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
    assert seen == bare
    assert [entry[0] for entry in bare] == ["pass", *["head"] * 8]


def test_the_result_has_ratios_and_raw_repeats(capture: ModuleType) -> None:
    found = capture.measure_case("tiny", "cpu")
    assert {way: len(runs) for way, runs in found["runs"].items()} == {"bare": 3, "worker": 3}
    assert all(run["seconds"] > 0 for runs in found["runs"].values() for run in runs)
    assert found["median"]["bare"]["seconds"] == sorted(run["seconds"] for run in found["runs"]["bare"])[1]
    result = {"cases": {"tiny": found, "gpu": capture.NOT_MEASURED}, "encode_ms": 1.25}
    assert "gpu | not measured" in capture.show(result)
    assert torch.get_num_threads() == 1
