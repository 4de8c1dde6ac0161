"""The whole demonstration: one seed of each variant. It takes minutes and tests that all packages work together."""

import json
from pathlib import Path

import pytest

from emkd.cli import main
from emkd.demo.report import REGIME, paired, table
from emkd.demo.run import cache_settings
from emkd.demo.variants import ABLATIONS, VARIANTS
from emkd.pipeline import estimate_job
from emkd.storage.cache import Cache, verify
from emkd.trainer import load_recipe


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("ray")
def test_the_demonstration(tmp_path, capsys):
    out = tmp_path / "demo-out"
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(out), "--seeds", "1"])
    printed = capsys.readouterr().out
    assert not left.value.code
    results = json.loads((out / "results.json").read_text())
    assert results["teacher"]["accuracy"] >= 0.93
    accuracy = {variant: found["accuracy"][0] for variant, found in results["students"].items()}
    assert set(accuracy) == set(VARIANTS)
    assert accuracy["emkd"] >= accuracy["sft"] + 0.05
    assert set(results["seconds"]) == {"teacher", "cache", "students"}

    cache = Cache.open(out / "cache")
    assert results["cache"]["samples"] == cache.n_samples == 100
    assert results["cache"]["bytes"] == sum(p.stat().st_size for p in (out / "cache").rglob("*") if p.is_file())
    assert verify(out / "cache") == []
    assert cache_settings(out).rows_per_shard == 25
    assert estimate_job(cache_settings(out)).n_bytes == pytest.approx(results["cache"]["bytes"], rel=0.1)
    expected = {"data", "teacher", "student-init", "cache", "students", "recipe.yaml", "results.json"}
    assert {path.name for path in out.iterdir()} == expected
    assert {p.name for p in (out / "students").iterdir()} == {f"{variant}-0" for variant in VARIANTS}
    assert load_recipe(out / "recipe.yaml").student.vision_pool == 2

    assert printed == table(results, out) + "\n"
    assert REGIME in printed
    assert [line.split()[1] for line in printed.splitlines()[-3:]] == ["cache-teacher", "train-student", "inspect"]


def results(**accuracy: list[float]) -> dict:
    students = {name: {"accuracy": values} for name, values in accuracy.items()}
    return {
        "teacher": {"accuracy": 0.95},
        "students": students,
        "cache": {"samples": 1, "bytes": 1000, "bytes_per_vision_token": 10.0},
        "seconds": {"teacher": 1.0},
    }


def test_differences_are_paired_by_seed():
    difference, error = paired([0.9, 0.8, 0.7], [0.8, 0.7, 0.9])
    assert difference == pytest.approx(0.0)
    assert error == pytest.approx(0.1)  # of 0.1, 0.1, -0.2: standard deviation 0.1732 over the root of 3
    assert paired([0.9], [0.8])[1] is None


def test_the_table_names_every_variant():
    everything = {name: [0.5, 0.6] for name in (*VARIANTS, *ABLATIONS)}
    shown = table(results(**everything), Path("out"))
    assert shown.count("seeds: 50.0 60.0") == len(everything)
    assert "emkd - emkd-random: +0.0 points ± 0.0 (standard error), paired by seed" in shown
