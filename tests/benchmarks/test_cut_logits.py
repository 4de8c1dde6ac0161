"""benchmarks/common/synthetic_logits.py against its docstring, and fidelity/cut_logits.py at a size that takes seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import synthetic_logits
from benchmarks.fidelity import cut_logits as fidelity
from emkd.demo.models import new_processor, new_student, new_teacher, save_model
from emkd.demo.scenes import write_scenes
from emkd.vlm.pooling import pooled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made() -> Any:
    """One tile of 729 tokens, at the real size of the vocabulary."""
    return synthetic_logits.synthetic(151_936, [(27, 27)])


def test_neighbours_share_a_quarter_of_their_largest_logits(made: Any) -> None:
    """Of 64; 0.23 by another implementation of the same recipe. On the first two of the tile's rows."""
    part = synthetic_logits.Synthetic(hidden=made.hidden[:54], head=made.head)
    cut = part.cut(64)
    rows = [set(ids.tolist()) for ids in cut.ids]
    beside = [len(rows[n] & rows[n + 1]) for n in range(53) if n != 26]
    below = [len(rows[n] & rows[n + 27]) for n in range(27)]
    apart = [len(rows[n] & rows[n + 13]) for n in range(14)]
    assert 0.18 < sum(beside + below) / len(beside + below) / 64 < 0.33
    assert sum(apart) / len(apart) / 64 < 0.1
    assert 0.4 < float(cut.retained_mass().mean()) < 0.9


def test_logits_are_what_the_recipe_says(made: Any) -> None:
    logits, d = made.logits(slice(0, 4)), 256
    exact = made.hidden[:4].double() @ made.head.weight.double().T + made.head.bias.double()
    assert torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits.double(), exact, rtol=2**-8, atol=1e-3)
    sharpness = made.hidden.pow(2).mean(1).sqrt() * d**0.5 / 3.5
    assert float(sharpness.min()) == pytest.approx(0.6, abs=1e-4)
    assert float(sharpness.max()) == pytest.approx(1.6, abs=1e-4)
    steps = (sharpness.view(27, 27)[:, 1:] - sharpness.view(27, 27)[:, :-1]).abs()
    assert float(steps.max()) < 0.4
    ranks = (-made.head.bias.double()).exp() - 20
    assert sorted(ranks.round().long().tolist()) == list(range(151_936))
    assert float(ranks[:100].mean()) < float(ranks[-100:].mean()) / 100


def test_hidden_states_are_smooth_to_four_fifths() -> None:
    """The rest is white: the correlation of neighbours is 0.8 times that of a Gaussian blur, exp(-1 / (4 · 2²))."""
    states = synthetic_logits.vision_states((40, 40), 256, np.random.default_rng(3)).view(40, 40, 256)
    torch.testing.assert_close(states.pow(2).mean(-1), torch.ones(40, 40))
    inner = states[8:-8, 8:-8]
    beside = float((inner[:, 1:] * inner[:, :-1]).mean())
    assert beside == pytest.approx(0.8 * np.exp(-1 / 16), abs=0.04)


def test_the_generator_is_a_function_of_the_seed() -> None:
    make = synthetic_logits.synthetic
    first, same, other = (make(500, [(3, 3)], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.hidden, same.hidden)
    assert torch.equal(first.logits(), same.logits())
    assert not torch.equal(first.logits(), other.logits())


def test_answers_are_more_confident_than_vision_tokens(made: Any) -> None:
    answers = synthetic_logits.answers(made, 48)
    first = answers.logits().softmax(1).amax(1)
    assert 0.2 < float(first.median()) < 0.6
    assert float(first.quantile(0.9)) > 0.8
    assert float(made.logits(slice(0, 729, 16)).softmax(1).amax(1).median()) < float(first.median())


def test_text_is_near_to_a_part_of_the_image(made: Any) -> None:
    text = synthetic_logits.text_states(made, 20)
    cosines = torch.nn.functional.cosine_similarity(text[:, None], made.hidden[None], dim=2)
    torch.testing.assert_close(cosines.amax(1), torch.full((20,), 0.5**0.5), atol=0.15, rtol=0)
    assert float(cosines.median().abs()) < 0.1


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is read of a folder that `emkd demo` makes, with untrained models."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data").mkdir()
    write_scenes(folder / "data" / "validation.parquet", 3, "validation", 1)
    teacher, processor = new_teacher(seed=0), new_processor(pads=True)
    save_model(teacher, processor, folder / "teacher")
    for name, start in (("student-init", teacher), ("students/emkd-0", new_teacher(seed=1))):
        pooled_processor = new_processor(pads=False)
        save_model(pooled(new_student(start), pooled_processor, 2), pooled_processor, folder / name)
    return folder


def test_the_demonstration_is_measured_at_every_k(demo: Path) -> None:
    found = fidelity.on_demo(demo, n_scenes=3)
    assert [(e["student"], e["k"]) for e in found] == [
        (name, k) for name in ("trained", "untrained") for k in (2, 4, 8, 16, 23)
    ]
    for entry in found[4::5]:
        assert entry["regret"] == 0.0
        assert entry["retained_mass"] == 1.0
        for tail in ("bucket", "uniform"):
            assert entry["vsd"][tail]["gradient_cosine"] == pytest.approx(1.0, abs=1e-5)
            assert entry["rld"][tail]["loss_error"] == pytest.approx(0.0, abs=1e-5)
    for entry in found[:2]:
        assert entry["vsd"]["bucket"]["loss_error"] < -0.01


def test_all_is_measured_and_chosen_by_the_rule(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, scenes = fidelity.on_synthetic, fidelity.on_demo
    monkeypatch.setattr(fidelity, "on_synthetic", lambda seeds: whole(seeds, vocabulary=1000))
    monkeypatch.setattr(fidelity, "on_demo", lambda folder: scenes(folder, n_scenes=2))
    found = fidelity.measure(demo, seeds=(0,))
    json.dumps(found, allow_nan=False)
    assert set(found["regret"]) == {"near", "far"}
    assert 0 <= found["regret"]["near"] < 0.1
    assert {(e["student"], e["k"]) for e in found["synthetic"]} == {
        (name, k) for name in ("near", "far") for k in (8, 16, 32, 64, 128)
    }
    at = [entry for entry in found["synthetic"] if entry["k"] == 64]
    means = {
        tail: sum(entry[loss][tail]["gradient_cosine"] for entry in at for loss in ("vsd", "rld")) / 4
        for tail in ("bucket", "uniform")
    }
    assert found["choice"]["mean"] == pytest.approx(means)
    assert found["choice"]["tail"] == max(means, key=means.__getitem__)
    shown = fidelity.show(found).splitlines()
    assert sum(line.startswith(("near | 64 | ", "trained | 23 | 1.00 | 0.0000 | ")) for line in shown) == 2
    assert f"synthetic, k = 64: the default is {found['choice']['tail']}" in shown


def test_a_larger_k_and_a_nearer_student_are_better() -> None:
    entries = fidelity.on_synthetic((0,), vocabulary=1000)
    by = {(entry["student"], entry["k"]): entry for entry in entries}
    assert by["near", 128]["regret"] < by["near", 8]["regret"]
    for loss in ("vsd", "rld"):
        assert by["near", 64][loss]["uniform"]["loss"] < by["far", 64][loss]["uniform"]["loss"] / 2
