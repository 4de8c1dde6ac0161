"""The model card says what a student was trained from, and claims nothing that was not measured."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

import emkd
from emkd.storage.cache import Cache
from emkd.trainer.recipe.recipe import make_recipe
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.student.card import CardFacts, model_card
from emkd.trainer.student.student import load_student
from tests import tiny

VERSIONS = {"emkd": "1.2", "transformers": "5.23", "torch": "2.15"}


def recipe(**content):
    return make_recipe(content, "here")


@pytest.fixture
def facts(cache_path):
    manifest = Cache.open(cache_path).manifest
    teacher = manifest.teacher.model_copy(update={"name": "org/teacher", "revision": "abc123", "licence": "apache-2.0"})
    return CardFacts(
        student="org/student-0.5b", data="instructions.json", revision="main", licence="mit", model_type="llava_pooled", vision_pool=2,
        n_parameters=1_234_567, n_trainable=2_345, n_samples=5_678, recipe=recipe(),
        cache="s3://bucket/private/place/my-cache/", manifest=manifest.model_copy(update={"teacher": teacher}),
        versions=VERSIONS,
    )  # fmt: skip


@pytest.fixture
def alone(facts):
    """Trained on labels alone."""
    plain = recipe(losses={"alpha": 1.0, "beta": 0.0, "gamma": 0.0})
    return replace(facts, cache=None, manifest=None, recipe=plain, model_type="llava", vision_pool=1)


def test_front_matter(facts, alone):
    assert yaml.safe_load(model_card(facts).split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["emkd", "knowledge-distillation"],
        "base_model": "org/student-0.5b",
        "license": "mit",
    }
    data = ModelCard(model_card(replace(facts, licence=None))).data
    assert data.license is None
    assert data.base_model == "org/student-0.5b"
    assert yaml.safe_load(model_card(alone).split("---\n")[1])["tags"] == ["emkd"]


@pytest.mark.parametrize("path", ["/home/me/models/student", "./student", "../student", "out/phase1/"])
def test_a_folder_is_no_base_model_of_the_hub(facts, path):
    text = model_card(replace(facts, student=path))
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    assert f"base model: `{path}`" in text


def test_teacher_and_cache(facts):
    text, manifest = model_card(facts), facts.manifest
    for part in (
        "teacher: `org/teacher`, revision `abc123`, llava, run in float32",
        f"SHA-256 of the teacher's weights: `{manifest.teacher.weights_sha256}`",
        "licence of the teacher: apache-2.0",
        "cache: `my-cache`, sealed\n",
        "data: `instructions.json`, of which 5,678 samples are in the cache",
        "logits stored, of 26: 26 per vision token, 26 per answer token",
        "precision: logits float32, affinities float32",
        f"SHA-256 of the cache's plan: `{manifest.plan_sha256}`",
    ):
        assert part in text
    assert "private/place" not in text
    assert "not sealed when the run started" in model_card(replace(facts, sealed=False))
    assert "(training used 8 of them)" in model_card(replace(facts, recipe=recipe(losses={"top_k": 8})))
    unknown = manifest.teacher.model_copy(update={"licence": None, "revision": None})
    text = model_card(replace(facts, manifest=manifest.model_copy(update={"teacher": unknown})))
    assert "licence of the teacher: unknown" in text
    assert "teacher: `org/teacher`, llava" in text


def test_without_a_cache(alone):
    text = model_card(alone)
    assert "trained on the labels of `instructions.json` alone (5,678 rows)" in text
    assert "| Sup | 1 | cross-entropy" in text
    for word in ("RLD", "VSD", "VLAD", "SHA-256", "Matching", "from a cache"):
        assert word not in text, word


def test_losses_and_their_weights(facts):
    text = model_card(facts)
    for row in ("| Sup | 0.5 | ", "| RLD | 0.5 | ", "| VSD | 0.25 | ", "| VLAD | 25 | "):
        assert row in text
    assert "2511.21106" in text
    assert (
        "Tail of the logits that are not stored: uniform. Matching of vision tokens: Manhattan distances of "
        "log-probabilities (in the paper of all logits)." in text
    )
    papers = model_card(replace(facts, recipe=recipe(losses={"cost": "logits"})))
    assert "Matching of vision tokens: Manhattan distances of logits.\n" in papers
    assert "| VSD |" not in model_card(replace(facts, recipe=recipe(losses={"beta": 0.0})))


def test_the_paper_has_one_divergence(facts, alone):
    """Training with another divergence is not the paper's method, and plain fine-tuning uses no divergence."""
    defines = "As defined by [EM-KD](https://arxiv.org/abs/2511.21106) (arXiv 2511.21106)"
    assert f"{defines}:" in model_card(facts)
    for losses in ({"divergence": "jsd"}, {"temperature": 2.0}):
        text = model_card(replace(facts, recipe=recipe(losses=losses)))
        assert f"{defines}, except for the divergence: the paper uses the reverse KL at temperature 1:" in text
    assert "On labels alone:" in model_card(alone)
    assert defines not in model_card(alone)


def test_the_student(facts, alone):
    text = model_card(facts)
    for part in (
        "base model: `org/student-0.5b`, revision `main`",
        "parameters: 1,234,567; trainable during the run: 2,345",
        "averages windows of 2 x 2 into one",
        "- licence: mit",
    ):
        assert part in text
    assert "LoRA" not in text
    assert "frozen during training:" not in text
    assert "averages windows" not in model_card(alone)
    student = {"freeze": ["model.vision_tower"], "lora": {"r": 4, "alpha": 8, "modules": ["model.language_model"]}}
    text = model_card(replace(facts, recipe=recipe(student=student)))
    assert "frozen during training: `model.vision_tower`" in text
    assert "of rank 4, alpha 8, dropout 0, in the linear layers of `model.language_model` except the LM head" in text


def test_the_recipe_in_the_card_is_the_recipe(facts):
    given = recipe(losses={"tail": "bucket"}, training={"learning_rate": 1e-5}, student={"vision_pool": 2})
    block = model_card(replace(facts, recipe=given)).split("```yaml\n")[1].split("```")[0]
    assert make_recipe(yaml.safe_load(block), "card") == given


def test_versions_are_those_installed_unless_said(facts):
    assert "- emkd 1.2\n- transformers 5.23\n- torch 2.15" in model_card(facts)
    kept = {
        name: getattr(facts, name)
        for name in ("student", "data", "model_type", "n_parameters", "n_trainable", "n_samples", "recipe")
    }
    assert f"- emkd {emkd.__version__}\n" in model_card(CardFacts(**kept))


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 1])
def test_the_code_in_the_card_loads_the_student(facts, student_path, tmp_path, window):
    """In a process that cannot import emkd; and it answers about a picture."""
    settings = TrainSettings(
        student=str(student_path), data="none", output=tmp_path, recipe=recipe(student={"vision_pool": window})
    )
    student = load_student(settings)
    student.card = model_card(replace(facts, model_type=student.model.config.model_type, vision_pool=window))
    student.save(tmp_path)
    code = student.card.split("```python\n")[1].split("```")[0]
    code = f"import sys; sys.modules['emkd'] = None\nfolder = {str(tmp_path)!r}\n{code}\nprint(type(model).__name__, processor.patch_size)"
    (tmp_path / "picture.png").write_bytes(tiny.png(1))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = "PooledLlavaForConditionalGeneration 10" if window == 2 else "LlavaForConditionalGeneration 5"
    assert done.stdout.strip().splitlines()[-1] == name


def test_no_claims(facts, alone):
    for text in (model_card(facts), model_card(alone)):
        assert "has to be measured" in text
        for word in ("accura", "state of the art", "outperform", "benchmark"):
            assert word not in text.lower()
