"""docs/demonstration.md, README.md and what `emkd demo` prints have the figures of benchmarks/results/demo_*.json."""

import io
import re
from statistics import mean

import numpy as np
import pytest
from PIL import Image

from emkd.demo.report import REGIME
from emkd.demo.variants import COSTS, RECIPE
from tests.figures import (
    ROOT,
    costs_on_validation,
    demo_condition_rows,
    demo_in_memory_rows,
    demo_paired_rows,
    demo_pairs_rows,
    demo_rows,
    demo_weights,
    lm_demo_rows,
    page,
    results,
    standard_error,
    table_rows,
)

PAGE = page("docs/demonstration.md")
PROSE = " ".join(PAGE.split())


def test_each_row_is_what_was_measured_and_no_other_row_is_there():
    makers = (demo_rows, demo_paired_rows, demo_pairs_rows, demo_condition_rows, demo_in_memory_rows, lm_demo_rows)
    assert table_rows(PAGE) == [row for maker in makers for row in maker()]


def test_figures_in_the_text_are_what_was_measured():
    assert f"EM-KD has on validation pictures: {demo_weights()}, where the recipe's is 1" in PROSE
    conditions = results("demo_conditions")["conditions"]
    assert f"means of {len(conditions['demo']['students']['emkd'])} seeds" in PROSE


def test_the_cache_is_as_good_as_the_teacher_in_memory():
    found = results("demo_in_memory")["accuracy"]
    assert f"test pictures, {len(found['dense'])} seeds" in PROSE
    for name in ("cache", "top k"):
        error = (standard_error(found[name]) ** 2 + standard_error(found["dense"]) ** 2) ** 0.5
        assert abs(mean(found[name]) - mean(found["dense"])) < 2 * error, name


def test_what_the_text_says_of_conditions_holds():
    """Where EM-KD pays, and where pooling is better."""

    def gain(condition, other):
        students = results("demo_conditions")["conditions"][condition]["students"]
        return mean(students["emkd"]) - mean(students[other])

    assert abs(gain("all cells", "rld")) < 0.01 > abs(gain("all cells", "emkd-random"))
    assert gain("no naming", "rld") < 0.02
    for condition in ("aligned grids", "content alone", "no naming"):
        assert gain(condition, "emkd-pooled") < -0.02
    for condition in ("demo", "right labels", "paper's beta"):
        assert gain(condition, "rld") > 0.08


def test_nothing_is_left_to_be_filled_in():
    for text in (PAGE, page("README.md"), page("docs/method.md"), REGIME):
        assert not re.search(r"[A-Z]+_(ROWS|TEXT|SEEDS)|XX points", text)


def test_the_default_cost_is_one_that_was_compared():
    compared = costs_on_validation()
    assert set(compared) == set(COSTS)
    assert all(len(accuracies) > 1 for accuracies in compared.values())


def test_every_seed_gains_over_answers_alone_and_over_random_pairs():
    students = {name: one["accuracy"] for name, one in results("demo_seeds")["results"]["students"].items()}
    for other in ("rld", "emkd-random", "emkd-pooled"):
        gains = [a - b for a, b in zip(students["emkd"], students[other], strict=True)]
        assert len(gains) == 10
        assert min(gains) >= 0.03, other
    sft, start = mean(students["sft"]), results("demo_seeds")["results"]["student-init"]["accuracy"]
    assert sft < start  # "ends below its own start"


def test_the_picture_is_the_demonstrations():
    picture = np.asarray(Image.open(io.BytesIO((ROOT / "docs" / "pairs.png").read_bytes())).convert("RGB"))
    assert picture.shape == (480, 1000, 3)


def test_what_the_demonstration_prints_is_what_was_measured():
    found, said = results("demo_seeds")["paired_differences"], " ".join(REGIME.split())
    for other in ("rld", "emkd-random"):
        assert f"{100 * found[f'emkd - {other}']['mean']:.1f}" in said
    assert RECIPE["losses"]["beta"] == pytest.approx(1.0)


def test_what_the_text_says_of_the_language_model_holds():
    found = results("lm_demo")
    students, pairs = found["students"], found["pairs"]
    for other, said in (("emkd-random", "11.4 ± 1.7"), ("emkd-pooled", "6.2 ± 2.3"), ("rld", "2.0 ± 1.2")):
        each = [100 * (one - two) for one, two in zip(students["emkd"], students[other], strict=True)]
        assert f"{mean(each):.1f} ± {standard_error(each):.1f}" == said
        assert said in PROSE, other
    shares = [f"{100 * pairs[name][what]:.0f}%" for name in ("log-probabilities", "random") for what in pairs[name]]
    assert shares == ["62%", "59%", "8%", "5%"]
    assert "62% show the same word and 59% lie in the same cell; of random ones 8% and 5%" in PROSE
    assert found["gpu"] == "not run"
    assert "GPU: not run" in PROSE
