"""The whole demonstration: one seed of each variant. It takes minutes and tests that all packages work together."""

import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from emkd.cli import main
from emkd.demo.report import REGIME, paired, table
from emkd.demo.run import MATCHINGS, cache_settings, make_data
from emkd.demo.variants import ABLATIONS, COSTS, DEFAULT_COST, RECIPE, VARIANTS
from emkd.pipeline import estimate_job
from emkd.storage.cache import Cache, verify
from emkd.trainer import load_recipe, make_recipe


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.xdist_group("ray")
def test_the_demonstration(tmp_path, capsys):
    out = tmp_path / "demo-out"
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(out), "--seeds", "1"])
    printed = capsys.readouterr().out
    assert not left.value.code
    results = json.loads((out / "results.json").read_text())
    assert results["teacher"]["accuracy"] >= 0.9
    accuracy = {variant: found["accuracy"][0] for variant, found in results["students"].items()}
    assert set(accuracy) == set(VARIANTS)
    assert accuracy["emkd"] >= accuracy["rld"] + 0.04
    assert accuracy["emkd"] >= accuracy["emkd-random"] + 0.04
    assert set(results["seconds"]) == {"teacher", "cache", "phase 1", "students", "pairs", "total"}
    for when in ("before", "after"):
        by_matching = results["pairs"][when]
        assert set(by_matching) == set(MATCHINGS)
        assert by_matching["random"]["content"] < 0.2 < 0.6 < by_matching["logits"]["content"]
    with Image.open(out / "pairs.png") as picture:
        assert picture.size == (1000, 480)

    cache = Cache.open(out / "cache")
    assert results["cache"]["samples"] == cache.n_samples == 400
    assert results["cache"]["bytes"] == sum(p.stat().st_size for p in (out / "cache").rglob("*") if p.is_file())
    assert verify(out / "cache") == []
    assert cache_settings(out).rows_per_shard == 100
    assert estimate_job(cache_settings(out)).n_bytes == pytest.approx(results["cache"]["bytes"], rel=0.2)
    expected = {
        "data", "teacher", "student-start", "student-init", "cache", "students", "align.yaml", "recipe.yaml", "pairs.png",
        "results.json",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == expected
    assert {p.name for p in (out / "students").iterdir()} == {f"{variant}-0" for variant in VARIANTS}
    assert load_recipe(out / "recipe.yaml").student.vision_pool == 2

    assert printed == table(results, out) + "\n"
    assert REGIME in printed
    by_hand = [shlex.split(line) for line in printed.splitlines()[-3:]]
    assert [command[:2] for command in by_hand] == [["emkd", c] for c in ("cache-teacher", "train-student", "inspect")]
    for command in by_hand:
        with pytest.raises(SystemExit) as left:
            main(command[1:])
        assert not left.value.code
    one, other = (
        load_file(folder / "model.safetensors") for folder in (out / "students" / "emkd-0", out / "my-student")
    )
    assert all(torch.equal(one[name], other[name]) for name in one), "the commands by hand make another student"


def results(**accuracy: list[float]) -> dict:
    students = {name: {"accuracy": values} for name, values in accuracy.items()}
    shares = {"random": {"content": 0.1, "place": 0.06}, "logits": {"content": 0.6, "place": 0.5}}
    return {
        "teacher": {"accuracy": 0.95},
        "student-init": {"accuracy": 0.8},
        "pairs": {"before": shares, "after": shares},
        "students": students,
        "cache": {"samples": 1, "bytes": 1000, "bytes_per_vision_token": 10.0},
        "seconds": {"teacher": 1.0},
    }


def test_differences_are_paired_by_seed():
    difference, error = paired([0.9, 0.8, 0.7], [0.8, 0.7, 0.9])
    assert difference == pytest.approx(0.0)
    assert error == pytest.approx(0.1)  # of 0.1, 0.1, -0.2: standard deviation 0.1732 over the root of 3
    assert paired([0.9], [0.8])[1] is None


def test_no_two_files_have_the_same_scenes(tmp_path):
    """Not even the same cells empty or the same order of questions."""
    make_data(tmp_path)
    orders = [
        [[turn["content"][-3:] for turn in row[::2]] for row in pq.read_table(tmp_path / f"{name}.parquet")["messages"].to_pylist()]
        for name in ("validation", "test")
    ]  # fmt: skip
    assert np.mean([one == other for one, other in zip(*orders, strict=True)]) < 0.1


def test_the_default_cost_is_the_recipes():
    """A variant without a cost is that of DEFAULT_COST, which no ablation repeats."""
    losses = make_recipe(RECIPE, "demo").losses
    assert {"cost": losses.cost, "cost_top_k": losses.cost_top_k} == COSTS[DEFAULT_COST]
    assert {name.removeprefix("emkd-") for name in ABLATIONS} & set(COSTS) == set(COSTS) - {DEFAULT_COST}


def test_the_table_names_every_variant():
    everything = {name: [0.5, 0.6] for name in (*VARIANTS, *ABLATIONS)}
    shown = table(results(**everything), Path("out"))
    assert shown.count("seeds: 50.0 60.0") == len(everything)
    assert "emkd - emkd-random: +0.0 points ± 0.0 (standard error), paired by seed" in shown
