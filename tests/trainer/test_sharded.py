"""Sharded students (--shard): gradients, what is saved, and evaluation are those of one process, in every family.

The reference is one process with the same samples in one step, which test_exactness.py holds to the dense computation.
"""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import yaml
from filelock import FileLock

from emkd.errors import UsageError
from emkd.trainer import Recipe, TrainSettings, make_recipe, train_student, with_flags
from tests import families, tiny
from tests.families.naive import STUDENT, TEACHER
from tests.trainer.test_ranks import LORA, PROJECTOR, assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("sharded")]

# By name: what is set. Each is compared with one process of the same settings, but for its first word.
KINDS = {
    "plain": {},
    "projector": PROJECTOR,  # most of its micro-batches have no gradient but of the picture that stands in
    "tower": {"student.freeze": ["vision_tower"]},
    "lora": LORA,
    "checkpointed": {"training.activation_checkpointing": True},
    "rates": {"student.learning_rates": {"projector": 1e-3}},
    "clipped": {"training.max_grad_norm": 1.0},
    "bfloat16": {"training.bf16": True},
    "last": {  # after the last block: no block has a backward pass
        "student.freeze": [
            "vision_tower",
            "projector",
            "model.language_model.layers",
            "model.language_model.embed_tokens",
        ],
    },
    "best": {  # the first of three steps is the best, and the weights after it are restored at the end
        "student.lora": {"r": 4, "modules": ["language_model", "lm_head"]},
        "training.max_steps": 3,
        "training.learning_rate": 0.3,
        "training.lr_scheduler_type": "constant",
        "training.eval_strategy": "steps",
        "training.eval_steps": 1,
        "training.save_strategy": "best",
        "training.load_best_model_at_end": True,
        "training.metric_for_best_model": "loss",
    },
}
# (ranks, samples of a micro-batch, accumulation) of 8 rows, and of 7: one rank has no sample in the last micro-batch
SPLITS = [(2, 4, 1), (2, 2, 2), (2, 1, 4), (4, 1, 2)]
FEW = [(2, 2, 2)]
SEVEN = [(2, 1, 4), (4, 1, 2)]


@pytest.fixture(scope="module")
def rows():
    """Rows 2 and 6 have no image."""
    rows = tiny.rows()
    more = {**rows[2], "messages": [tiny.turn("user", "what is red"), tiny.turn("assistant", "that one")]}
    return [*rows, more, {**rows[0], "images": [tiny.png(50)]}]


@pytest.fixture(scope="module")
def runs(rows, teacher_path, student_path, tmp_path_factory):
    """Runs all cases, and returns a function from (name, ranks, size, accumulation) to the folder of its results.

    One of pytest's workers does, and the others wait for it: they do not keep the tests of a group together
    (pytest-xdist 3.8 with pytest 9.2).
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sharded"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            run_all(folder, rows, teacher_path, student_path)
            (folder / "done").touch()
    return lambda name, split: folder / "-".join(map(str, (name, *split)))


def run_all(folder, rows, teacher_path, student_path):
    """Write the gradients, metrics and students of all cases to a folder."""
    folder.mkdir()
    cases = []

    def add(name, student, data, cache, split, flags, **more):
        ranks, size, accumulation = split
        where = folder / f"{name}-{ranks}-{size}-{accumulation}"
        batch = {
            "training.per_device_train_batch_size": size,
            "training.gradient_accumulation_steps": accumulation,
            "student.shard": ranks > 1,
        }
        cases.append(
            {
                "ranks": ranks, "student": str(student), "data": str(data), "cache": str(cache), "output": str(where),
                "gradients": f"{where}.safetensors", "flags": {**flags, **batch}, **more,
            }
        )  # fmt: skip

    for n, splits in ((8, SPLITS), (7, SEVEN)):
        data = tiny.write_data(folder / f"{n}.parquet", rows[:n])
        cache = tiny.make_cache(teacher_path, data, folder / f"cache-{n}", rows_per_shard=256)
        for name, flags in KINDS.items() if n == 8 else [("seven", {}), ("seven-projector", PROJECTOR)]:
            for split in [(1, n, 1), *(splits if name in ("plain", "projector") or n == 7 else FEW)]:
                more = {"eval_data": str(data)} if name in ("seven", "best") else {}
                add(name, student_path, data, cache, split, flags, **more)
    for family in families.FAMILIES:
        student = families.save(family, folder / f"{family}-student", **STUDENT)
        teacher = families.save(family, folder / f"{family}-teacher", **TEACHER)
        cache = tiny.make_cache(teacher, folder / "8.parquet", folder / f"{family}-cache", rows_per_shard=256)
        for split in ((1, 8, 1), (2, 2, 2), (4, 1, 2)):
            add(family, student, folder / "8.parquet", cache, split, {"student.vision_pool": None})
    (folder / "cases.json").write_text(json.dumps(cases))
    for ranks in (1, 2, 4):
        launch(ranks, folder)


def launch(ranks, folder):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.trainer.ranks", str(folder / "cases.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


def gradients(folder):
    return safetensors.torch.load_file(f"{folder}.safetensors")


CASES = [
    *((name, (1, 8, 1), split) for name in ("plain", "projector") for split in SPLITS),
    *((name, (1, 8, 1), FEW[0]) for name in KINDS if name not in ("plain", "projector", "bfloat16")),
    *((name, (1, 7, 1), split) for name in ("seven", "seven-projector") for split in SEVEN),
    *((family, (1, 8, 1), split) for family in families.FAMILIES for split in ((2, 2, 2), (4, 1, 2))),
]


@pytest.mark.parametrize(("name", "alone", "split"), CASES)
def test_the_gradient_is_that_of_one_process(runs, name, alone, split):
    expected = gradients(runs(name, alone))
    assert any(float(value.norm()) > 1e-3 for value in expected.values())
    assert_equal(gradients(runs(name, split)), expected)


def test_under_bfloat16_weights_and_gradients_are_float32(runs):
    expected, found = (gradients(runs("bfloat16", split)) for split in ((1, 8, 1), FEW[0]))
    assert {value.dtype for value in found.values()} == {torch.float32}
    whole = torch.cat([value.flatten() for value in expected.values()])
    differing = torch.cat([(found[name] - value).flatten() for name, value in expected.items()])
    assert float(differing.norm()) <= 0.01 * float(whole.norm())


def test_what_is_saved_is_the_same_folder(runs):
    alone, sharded = runs("plain", (1, 8, 1)), runs("plain", (4, 1, 2))
    names = {path.name for path in alone.iterdir()}
    assert {path.name for path in sharded.iterdir()} == names
    assert (alone / "config.json").read_text() == (sharded / "config.json").read_text()
    expected, found = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (alone, sharded))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert float((found[name] - tensor).abs().max()) <= 4.1e-5  # a step of AdamW is at most the learning rate


def test_lora_is_merged_when_it_is_saved(runs):
    alone, sharded = runs("lora", (1, 8, 1)), runs("lora", FEW[0])
    expected, found = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (alone, sharded))
    assert set(found) == set(expected)
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) < 1e-5


@pytest.mark.parametrize("split", SEVEN)
def test_evaluation_is_of_all_rows(runs, split):
    """Seven rows do not divide by two or four: a rank evaluates an empty batch."""
    alone, found = (json.loads(runs("seven", some).with_suffix(".json").read_text()) for some in ((1, 7, 1), split))
    assert found["eval_answer_tokens"] == alone["eval_answer_tokens"] > 20
    for name in ("eval_loss", "eval_accuracy", "train_loss"):
        assert found[name] == pytest.approx(alone[name], rel=1e-4), name


def test_the_best_of_three_steps_is_restored(runs):
    """After an evaluation, whole tensors of the modules outside of layers have to be freed before that."""
    alone, found = (json.loads(runs("best", some).with_suffix(".json").read_text()) for some in ((1, 8, 1), FEW[0]))
    assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-3)
    trained = sorted(runs("best", FEW[0]).glob("checkpoint-*"))
    assert [folder.name for folder in trained] == [
        folder.name for folder in sorted(runs("best", (1, 8, 1)).glob("c*-*"))
    ]


def test_one_process_is_refused(student_path, data_path, cache_path, tmp_path):
    recipe = with_flags(Recipe(), {"student.shard": True})
    with pytest.raises(UsageError, match=r"one process has no other .* use --workers 2"):
        train_student(
            TrainSettings(
                student=str(student_path), data=str(data_path), cache=str(cache_path), output=tmp_path / "out",
                recipe=recipe,
            )
        )  # fmt: skip


def test_trainers_own_sharding_is_refused():
    with pytest.raises(UsageError, match=r"training.fsdp cannot be set: student.shard: true"):
        make_recipe(yaml.safe_load("training: {fsdp: full_shard}"), "recipe.yaml")
