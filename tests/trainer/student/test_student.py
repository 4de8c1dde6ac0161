"""A student is loaded as its recipe says, saved as an ordinary checkpoint, and restored bit for bit."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from emkd.errors import ModelError, UsageError
from emkd.trainer import train_student
from emkd.trainer.recipe.recipe import make_recipe
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.student.student import load_student
from emkd.vlm.loading import load
from emkd.vlm.pooled_models import PooledLlavaForConditionalGeneration
from tests import tiny
from tests.trainer.student.test_lora import batch, learn, logits
from tests.trainer.student.test_parameters import tied_model

pytestmark = pytest.mark.slow

LORA = {"r": 4, "alpha": 8}


def student_of(path, seed=0, **student):
    torch.manual_seed(seed)
    recipe = make_recipe({"student": student}, "here")
    return load_student(TrainSettings(student=str(path), data="none", output=path / "none", recipe=recipe))


@pytest.fixture
def tied_path(tmp_path):
    tied_model().save_pretrained(tmp_path / "tied")
    tiny.new_processor().save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def state(student):
    return {name: tensor.clone() for name, tensor in student.model.state_dict().items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_loaded_as_the_recipe_says(student_path):
    student = student_of(student_path, vision_pool=2, freeze=["model.vision_tower"], lora=LORA)
    model = student.model
    assert type(model) is PooledLlavaForConditionalGeneration
    assert student.processor.patch_size == 2 * tiny.PATCH
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in learning} == {"multi_modal_projector", "language_model"}
    assert student.n_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert student.n_parameters == sum(p.numel() for p in model.parameters()) > student.n_trainable
    assert not any(".lora_" in name for name in student_of(student_path).model.state_dict())


def test_dtypes(student_path):
    assert student_of(student_path, dtype="bfloat16").model.dtype == torch.bfloat16
    assert student_of(student_path, dtype="bfloat16", lora=LORA).model.dtype == torch.bfloat16


def test_attention_is_the_recipes(student_path):
    assert student_of(student_path, attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="cannot be loaded.*flesh"):
        student_of(student_path, attn_implementation="flesh")


def test_a_student_of_which_nothing_learns(student_path):
    with pytest.raises(
        UsageError,
        match=r"no parameter of .* is trainable, because student.freeze matches all .*remove one of model, lm_head",
    ):
        student_of(student_path, freeze=["model", "lm_head"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("where", ["student_path", "tied_path"])
def test_saved_and_restored_bit_for_bit(request, tmp_path, where, lora, dtype):
    """Into a student that was trained further, and into one of a new process, with other initial additions."""
    path = request.getfixturevalue(where)
    student = student_of(path, vision_pool=2, lora=lora, dtype=dtype)
    if dtype == "float32":
        learn(student.model)
    else:
        with torch.no_grad():
            for parameter in student.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 10)
    expected = state(student)
    student.save(tmp_path / "saved")
    assert_same(state(student), expected)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    student.restore(tmp_path / "saved")
    assert_same(state(student), expected)
    fresh = student_of(path, seed=9, vision_pool=2, lora=lora, dtype=dtype)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in state(fresh).items())
    fresh.restore(tmp_path / "saved")
    assert_same(state(fresh), expected)
    assert (tmp_path / "saved" / "trainable.safetensors").is_file() == (lora is not None)
    head, embeddings = fresh.model.get_output_embeddings().weight, fresh.model.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) == (where == "tied_path"), "tied weights stay tied"


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("where", ["student_path", "tied_path"])
def test_what_is_saved_is_an_ordinary_checkpoint(request, tmp_path, where, lora):
    student = student_of(request.getfixturevalue(where), vision_pool=2, lora=lora)
    learn(student.model)
    student.save(tmp_path / "saved")
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    assert model.config.vision_pool == 2
    torch.testing.assert_close(logits(model), logits(student.model), atol=1e-5, rtol=1e-5)
    inputs = batch(model)
    said = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[2])
    assert said.shape == (2, inputs["input_ids"].shape[1] + 3)
    assert AutoProcessor.from_pretrained(tmp_path / "saved").patch_size == 2 * tiny.PATCH
    assert (tmp_path / "saved" / "generation_config.json").is_file()
    assert not list((tmp_path / "saved").glob("*.bin"))
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


@pytest.mark.slow
def test_what_lora_leaves_needs_no_peft(student_path, tmp_path):
    student = student_of(student_path, vision_pool=2, lora=LORA)
    learn(student.model)
    student.save(tmp_path)
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from emkd.vlm.loading import load\n"
        f"vlm = load({str(tmp_path)!r})\n"
        "print(sorted(vlm.model.state_dict()) and type(vlm.model).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "PooledLlavaForConditionalGeneration"


def test_a_second_phase_on_what_lora_left(student_path, tmp_path):
    """trainable.safetensors next to the weights does not disturb loading, and is left out of the final folder."""
    student = student_of(student_path, lora=LORA)
    learn(student.model)
    student.save(tmp_path / "one")
    student.save(tmp_path / "two", resumable=False)
    assert not (tmp_path / "two" / "trainable.safetensors").exists()
    one, two = (student_of(tmp_path / name) for name in ("one", "two"))
    assert_same(state(one), state(two))
    torch.testing.assert_close(logits(one.model), logits(student.model), atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ModelError, match=r"two has no trainable.safetensors: .*use it as --student, with another --output"
    ):
        student.restore(tmp_path / "two")


def test_additions_of_other_weights_are_refused(student_path, tmp_path):
    """The folder named with --student has other weights than when the run started."""
    shutil.copytree(student_path, tmp_path / "student")
    student_of(tmp_path / "student", lora=LORA).save(tmp_path / "saved")
    file = tmp_path / "student" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight" if "lm_head.weight" in weights else next(iter(weights))] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"was trained on other weights than --student has now: the file names SHA-256 \w{12}, --student has \w{12}",
    ):
        student_of(tmp_path / "student", lora=LORA).restore(tmp_path / "saved")


def test_additions_of_another_shape_are_refused_and_nothing_is_changed(student_path, tmp_path):
    student_of(student_path, lora=LORA).save(tmp_path)
    other = student_of(student_path, lora={**LORA, "r": 2})
    before = state(other)
    with pytest.raises(
        ModelError,
        match=r"14 tensors differ|28 tensors differ, for instance .*lora_A.default.weight is float32 \[4, 24\], expected float32 \[2, 24\]",
    ):
        other.restore(tmp_path)
    assert_same(state(other), before)
    less = student_of(student_path, lora=LORA, freeze=["model.multi_modal_projector"])
    with pytest.raises(ModelError, match=r"multi_modal_projector.linear_1.bias is unexpected"):
        less.restore(tmp_path)
    (tmp_path / "trainable.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="trainable.safetensors cannot be read"):
        less.restore(tmp_path)


def test_weights_of_another_student_are_refused(student_path, tmp_path):
    student_of(tiny.save_model(tmp_path / "wide", seed=3, hidden=32, lm_head_rows=72)).save(tmp_path / "saved")
    with pytest.raises(
        ModelError,
        match=r"does not fit the student of this run: \d+ tensors differ, for instance lm_head.weight is float32 \[72, 32\], expected float32 \[72, 24\]",
    ):
        student_of(student_path).restore(tmp_path / "saved")
    student_of(student_path, dtype="bfloat16").save(tmp_path / "coarse")
    with pytest.raises(ModelError, match=r"is bfloat16 .*, expected float32"):
        student_of(student_path).restore(tmp_path / "coarse")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        student_of(student_path).restore(tmp_path / "saved")


def test_the_card_is_saved_with_the_student(student_path, tmp_path):
    student = student_of(student_path)
    student.save(tmp_path / "without")
    assert not (tmp_path / "without" / "README.md").exists()
    student.card = "# café\n"
    student.save(tmp_path / "with")
    assert (tmp_path / "with" / "README.md").read_bytes() == "# café\n".encode()


def test_saved_processors_are_whole(student_path, tmp_path):
    student_of(student_path).save(tmp_path)
    saved, first = load(str(tmp_path)).processor, load(str(student_path)).processor
    assert saved.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert saved.chat_template == first.chat_template
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava"


@pytest.mark.slow
def test_a_resumed_run_of_lora_is_the_undisturbed_one(student_path, data_path, cache_path, tmp_path):
    """With dropout, and a separate rate for the vision tower: two of four steps, then the rest."""
    recipe = make_recipe(
        {
            "student": {
                "vision_pool": 2,
                "lora": {**LORA, "dropout": 0.3},
                "learning_rates": {"model.vision_tower": 1e-4},
            },
            "training": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2},
        },
        "here",
    )
    given = {"student": str(student_path), "data": str(data_path), "cache": str(cache_path), "recipe": recipe}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_student(TrainSettings(output=whole, **given))
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    shutil.copy(whole / "run.json", stopped)
    train_student(TrainSettings(output=stopped, resume=True, **given))
    for name in ("trainable.safetensors", "model.safetensors"):
        middle, found, expected = (
            load_file(path / name)
            for path in (whole / "checkpoint-2", stopped / "checkpoint-4", whole / "checkpoint-4")
        )
        assert_same(found, expected)
        assert any(not torch.equal(middle[name], expected[name]) for name in expected)
