"""The gradient of an optimizer step depends on its samples, not on their distribution over micro-batches and ranks.

Rows with one, several and no images, with answers of one to five tokens: each micro-batch has other counts. The
reference is the step as one micro-batch on one rank, which test_exactness.py holds to the dense computation.
"""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("ranks")]

# (ranks, samples of a micro-batch, accumulation): always the same 8 rows, or 7 of which the last rank gets too few
EIGHT = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 4, 1), (2, 2, 2), (2, 1, 4)]
SEVEN = [(1, 7, 1), (1, 2, 4), (2, 3, 2), (2, 1, 4)]
CHECKPOINTED = {"training.activation_checkpointing": True}
LORA = {"student.lora": {"r": 4}, "student.freeze": ["model.vision_tower", "model.multi_modal_projector"]}
# One of six rows is unusable, and one may be skipped: both ranks meet it, in many epochs, and it counts once.
SFT = {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0, "max_skipped": 0.2}
# Rows without an image have no gradient here at all, and a rank may hold nothing but such rows.
PROJECTOR = {"student.freeze": ["model.vision_tower", "model.language_model", "lm_head"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Row 2 and 6 without an image; one whole shard, so that the order is a function of the seed alone."""
    rows = tiny.rows()
    more = {**rows[2], "messages": [tiny.turn("user", "what is red"), tiny.turn("assistant", "that one")]}
    rows = [*rows, more, {**rows[0], "images": [tiny.png(50)]}]
    folder = tmp_path_factory.mktemp("data")
    return {n: tiny.write_data(folder / f"{n}.parquet", rows[:n]) for n in (8, 7)}


@pytest.fixture(scope="module")
def gradients(data, teacher_path, student_path, tmp_path_factory):
    """By (rows, trainable modules, ranks, batch size, accumulation); each number of ranks is one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = []
    for rows, splits in ((8, EIGHT), (7, SEVEN)):
        cache = tiny.make_cache(teacher_path, data[rows], folder / f"cache-{rows}", rows_per_shard=256)
        few = [splits[0], (2, 2, 2)] if rows == 8 else []
        for learning, flags, chosen in (
            ("", {}, splits), ("projector", PROJECTOR, splits), ("lora", LORA, few), ("checkpointed", CHECKPOINTED, few)
        ):  # fmt: skip
            for ranks, size, accumulation in chosen:
                name = f"{rows}-{learning}-{ranks}-{size}-{accumulation}"
                batch = {
                    "training.per_device_train_batch_size": size,
                    "training.gradient_accumulation_steps": accumulation,
                }
                cases.append(
                    {
                        "ranks": ranks, "student": str(student_path), "data": str(data[rows]), "cache": str(cache),
                        "output": str(folder / name), "gradients": str(folder / f"{name}.safetensors"),
                        "flags": {**flags, **batch},
                    }
                )  # fmt: skip
    bad = tiny.rows()
    bad[1]["images"] = [b"broken", tiny.png(3)]
    bad = tiny.write_data(folder / "bad.parquet", bad)
    for ranks in (1, 2):
        name = f"bad-{ranks}"
        cases.append(
            {
                "ranks": ranks, "student": str(student_path), "data": str(bad), "output": str(folder / name),
                "gradients": str(folder / f"{name}.safetensors"), "eval_data": str(data[8]),
                "flags": {**SFT, "training.max_steps": 16, "training.logging_steps": 4, "training.per_device_train_batch_size": 2 // ranks},
            }
        )  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(1, folder)
    launch(2, folder)

    def found(*key, what="safetensors"):
        path = folder / f"{'-'.join(map(str, key))}.{what}"
        return safetensors.torch.load_file(path) if what == "safetensors" else json.loads(path.read_text())

    return found


def launch(ranks, folder):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.trainer.ranks", str(folder / "cases.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def assert_equal(found, expected):
    """To 1e-5 of each parameter's gradient; keys' biases have none but rounding, so there of a thousandth of the whole."""
    assert set(found) == set(expected)
    whole = float(torch.cat([one.flatten() for one in expected.values()]).double().norm())
    for name, one in expected.items():
        difference = float((found[name].double() - one.double()).norm())
        assert difference <= 1e-5 * max(float(one.double().norm()), 1e-3 * whole), (name, difference)


@pytest.mark.parametrize("learning", ["", "projector"])
@pytest.mark.parametrize(("rows", "split"), [(8, s) for s in EIGHT[1:]] + [(7, s) for s in SEVEN[1:]])
def test_the_gradient_does_not_depend_on_the_split(gradients, learning, rows, split):
    expected = gradients(rows, learning, 1, rows, 1)
    assert any(float(value.norm()) > 1e-3 for value in expected.values())
    if learning == "projector":
        assert {name.rsplit(".", 2)[0] for name in expected} == {"model.multi_modal_projector"}
    assert_equal(gradients(rows, learning, *split), expected)


def test_activation_checkpointing_on_two_ranks(gradients):
    assert_equal(gradients(8, "checkpointed", 2, 2, 2), gradients(8, "", 1, 8, 1))


def test_lora_on_two_ranks(gradients):
    """Rows without an image have a gradient here, but only where additions are."""
    expected = gradients(8, "lora", 1, 8, 1)
    assert all(".lora_" in name for name in expected)
    assert_equal(gradients(8, "lora", 2, 2, 2), expected)


def test_a_bad_row_counts_once_and_evaluation_is_of_all_rows(gradients):
    alone, together = (gradients("bad", ranks, what="json") for ranks in (1, 2))
    assert together["eval_answer_tokens"] == alone["eval_answer_tokens"] > 27
    for name in ("eval_loss", "eval_accuracy", "train_loss"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name


def test_other_samples_have_another_gradient(gradients):
    """So that the comparison above can fail."""
    eight, seven = gradients(8, "", 1, 8, 1), gradients(7, "", 1, 7, 1)
    name = "lm_head.weight"
    assert float((eight[name] - seven[name]).norm()) > 1e-2 * float(eight[name].norm())
    assert torch.isfinite(eight[name]).all()
