import dataclasses
import re
from pathlib import Path

import pytest
import typer
import yaml
from transformers import TrainingArguments

from emkd.cli import RECIPE_FLAGS, app
from emkd.errors import InputNotFoundError, UsageError
from emkd.trainer.arguments import RESERVED, training_arguments
from emkd.trainer.recipe import Recipe, load_recipe, make_recipe, with_flags


def test_defaults_are_the_papers():
    weights = Recipe().losses.weights
    assert (weights.alpha, weights.beta, weights.gamma) == (0.5, 0.25, 25.0)


def test_a_file_and_flags_over_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"losses": {"alpha": 0.3, "beta": 1.0}, "training": {"max_steps": 7}}))
    recipe = with_flags(load_recipe(path), {"losses.beta": 2.0, "training.seed": 3, "losses.gamma": None})
    assert (recipe.losses.alpha, recipe.losses.beta, recipe.losses.gamma) == (0.3, 2.0, 25.0)
    assert recipe.training == {"max_steps": 7, "seed": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"losses": {"alfa": 1}}, r"unknown key 'losses.alfa'; did you mean 'alpha'"),
        ({"loses": {}}, r"unknown key 'loses'; did you mean 'losses'"),
        ({"training": {"learnig_rate": 1}}, r"training.learnig_rate is no field .*did you mean 'learning_rate'"),
        ({"training": {"output_dir": "x"}}, r"training.output_dir cannot be set: use --output"),
        ({"training": {"auto_find_batch_size": True}}, "its size is fixed"),
        ({"losses": {"alpha": 2}}, "losses.alpha: .*less than or equal to 1, got 2"),
        ({"losses": {"tail": "fat"}}, "losses.tail: .*'bucket' or 'uniform', got 'fat'"),
        ([1], "the recipe: .*valid dictionary"),
        ({"training": {"label_smoothing_factor": 0.1}}, "smoothing is none of them"),
        ({"training": {"group_by_length": True}}, "samples come shard by shard"),
        ({"training": {"train_sampling_strategy": "group_by_length"}}, "samples come shard by shard"),
        ({"training": {"ignore_data_skip": True}}, "goes on with the exact next sample"),
        ({"training": {"fsdp": "full_shard"}}, "its weights are not whole"),
        ({"student": {"learning_rates": {"model": 0}}}, "student.learning_rates.model: .*greater than 0, got 0"),
        ({"student": {"lora": {"rank": 8}}}, r"unknown key 'student.lora.rank'; did you mean 'r'|known: r, alpha"),
    ],
)
def test_what_is_wrong_is_named(content, message):
    with pytest.raises(UsageError, match=message):
        make_recipe(content, "here")


def test_what_is_reserved_is_refused_each_for_its_reason():
    for name, reason in RESERVED.items():
        with pytest.raises(UsageError, match=f"training.{name} cannot be set: {re.escape(reason)}"):
            make_recipe({"training": {name: 1}}, "here")


def test_the_command_line_and_recipes_agree():
    """Each flag stands for a place in the recipe, and its help names the default that holds there."""
    command = typer.main.get_command(app).commands["train-student"]
    options = {option.name: option for option in command.params}
    arguments = training_arguments(Path("nowhere"), {})
    for flag, place in RECIPE_FLAGS.items():
        section, _, name = place.rpartition(".")
        if section == "training":
            default = getattr(arguments, name)
            assert name in {field.name for field in dataclasses.fields(TrainingArguments)}
        else:
            default = getattr(getattr(Recipe(), section) if section else Recipe(), name)
        assert options[flag].default is None, "a flag that is not given must not go over a file"
        stated = re.search(r"\(default ([^)]*)\)", options[flag].help)
        if stated is None:
            assert default in (None, (), -1), (flag, default)
        else:
            assert type(default)(stated[1]) == default, flag


def test_numbers_are_converted_only_where_a_number_is_meant():
    assert make_recipe({"training": {"run_name": "7", "weight_decay": "1e-1"}}, "here").training == {
        "run_name": "7",
        "weight_decay": 0.1,
    }


def test_files(tmp_path):
    with pytest.raises(InputNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe()


def test_numbers_as_people_write_them(tmp_path):
    """YAML 1.1 reads 2e-5 as a text and no as false."""
    (tmp_path / "r.yaml").write_text("training: {learning_rate: 2e-5, optim: sgd, save_strategy: no}")
    expected = {"learning_rate": 2e-5, "optim": "sgd", "save_strategy": "no"}
    assert load_recipe(tmp_path / "r.yaml").training == expected
    (tmp_path / "latin.yaml").write_bytes(b"training: {optim: \xe9}")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(tmp_path / "latin.yaml")
