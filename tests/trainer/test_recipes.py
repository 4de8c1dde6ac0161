"""The recipes of emkd/recipes/: each can be used unchanged, and does what its comments say."""

from pathlib import Path

import pytest
import torch
import yaml

from emkd.demo.variants import ALIGN, RECIPE
from emkd.trainer import train_student, with_flags
from emkd.trainer.recipe.arguments import training_arguments
from emkd.trainer.recipe.recipe import load_recipe, make_recipe
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.student.student import load_student
from emkd.vlm.loading import load_model
from tests import tiny

RECIPES = Path(__file__).parents[2] / "emkd" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SHORT = {
    "training.max_steps": 2, "training.num_train_epochs": None, "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 2, "training.logging_steps": 1, "training.save_strategy": "no",
    "training.dataloader_num_workers": 0, "training.use_cpu": True,
}  # fmt: skip


def recipe_of(name):
    return load_recipe(name)


def learning(recipe, path):
    """Prefixes of the names of trainable parameters, for a student in `path`."""
    settings = TrainSettings(student=str(path), data="none", output=path / "none", recipe=recipe)
    student = load_student(settings)
    names = [name for name, p in student.model.named_parameters() if p.requires_grad]
    return {".".join(name.split(".")[:2]) for name in names}, names


def test_there_are_recipes():
    assert NAMES == ["demo", "demo-align", "phase1-align", "phase2-emkd", "phase2-lora"]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_and_says_when_to_use_it(name, tmp_path):
    arguments = training_arguments(tmp_path, {**recipe_of(name).training, "use_cpu": True})
    assert arguments.learning_rate == recipe_of(name).training["learning_rate"]
    opening = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert "\n# Use it" in opening or "for GPUs with too little memory" in opening


def test_the_demonstrations_is_the_demonstrations():
    assert recipe_of("demo") == make_recipe(RECIPE, "variants")
    assert yaml.safe_load((RECIPES / "demo.yaml").read_text()) == RECIPE
    assert yaml.safe_load((RECIPES / "demo-align.yaml").read_text()) == ALIGN


def test_phase_1_trains_exactly_the_projector(student_path):
    recipe = recipe_of("phase1-align")
    found, names = learning(recipe, student_path)
    assert found == {"model.multi_modal_projector"}
    assert len(names) == 4, "two layers with weight and bias"
    assert recipe.losses.weights.named == {"sup": 1.0}
    assert not recipe.losses.weights.needs_cache


def test_phase_2_trains_all_with_the_papers_weights(student_path):
    recipe = recipe_of("phase2-emkd")
    whole = {"lm_head.weight", "model.language_model", "model.multi_modal_projector", "model.vision_tower"}
    assert learning(recipe, student_path)[0] == whole
    weights = recipe.losses.weights
    assert (weights.alpha, weights.beta, weights.gamma) == (0.5, 0.25, 25.0)
    assert recipe.student.learning_rates["vision_tower"] < recipe.training["learning_rate"]


def test_all_that_learns_by_lora_is_additions(student_path):
    found, names = learning(recipe_of("phase2-lora"), student_path)
    assert found == {"model.language_model", "model.multi_modal_projector"}
    assert all(".lora_" in name for name in names)


def test_recipes_of_a_phase_2_differ_in_what_learns_alone():
    whole, low_rank = recipe_of("phase2-emkd"), recipe_of("phase2-lora")
    assert whole.losses == low_rank.losses
    assert whole.training | {"learning_rate": None} == low_rank.training | {"learning_rate": None}


@pytest.mark.slow
@pytest.mark.parametrize("second", ["phase2-emkd", "phase2-lora"])
def test_the_two_phases_one_after_the_other(second, student_path, data_path, cache_path, tmp_path):
    """Phase 1 has no cache and changes the projector alone; phase 2 starts from the student of phase 1."""
    common = {"data": str(data_path)}
    one, two = tmp_path / "phase1", tmp_path / "phase2"
    train_student(
        TrainSettings(
            student=str(student_path), output=one, recipe=with_flags(recipe_of("phase1-align"), SHORT), **common
        )
    )
    before, aligned = (load_model(path, dtype="auto").state_dict() for path in (student_path, one))
    moved = {name for name in before if not torch.equal(before[name], aligned[name])}
    assert moved
    assert all(name.startswith("model.multi_modal_projector.") for name in moved)
    recipe = with_flags(recipe_of(second), SHORT)
    metrics = train_student(TrainSettings(student=str(one), cache=str(cache_path), output=two, recipe=recipe, **common))
    assert metrics["train_loss"] > 0
    trained = load_model(two, dtype="auto")
    assert trained.config.vision_pool == 2
    after = trained.state_dict()
    changed = {name for name in aligned if not torch.equal(aligned[name].to(after[name].dtype), after[name])}
    tops = {name.split(".")[1] for name in changed}
    assert tops >= {"multi_modal_projector", "language_model"}
    assert ("vision_tower" in tops) == (second == "phase2-emkd")


def test_the_tiny_student_is_like_the_real_ones():
    """What the recipes name are the names that transformers gives to every LLaVA's parts."""
    names = {".".join(name.split(".")[:2]) for name, _ in tiny.new_model(1, 24, 64).named_parameters()}
    assert names == {"lm_head.weight", "model.language_model", "model.multi_modal_projector", "model.vision_tower"}
