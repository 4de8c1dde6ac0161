import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import TrainingArguments

from emkd.cli import app
from emkd.commands.student import train_student
from emkd.errors import InputNotFoundError, UsageError
from emkd.trainer.recipe.arguments import RESERVED, training_arguments
from emkd.trainer.recipe.recipe import Recipe, load_recipe, make_recipe, with_flags


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
        ({"training": {"learnig_rate": 1}}, r"training.learnig_rate is not a field .*did you mean 'learning_rate'"),
        ({"training": {"output_dir": "x"}}, r"training.output_dir cannot be set: use --output"),
        ({"training": {"auto_find_batch_size": True}}, "its size is fixed"),
        ({"losses": {"alpha": 2}}, "losses.alpha: .*less than or equal to 1, got 2"),
        ({"losses": {"tail": "fat"}}, "losses.tail: .*'bucket' or 'uniform', got 'fat'"),
        ({"losses": {"divergence": "tv"}}, "losses.divergence: .*'reverse_kl', 'forward_kl' or 'jsd', got 'tv'"),
        ({"losses": {"solver": "lapjv"}}, "losses.solver: .*'scipy' or 'cuda', got 'lapjv'"),
        ({"losses": {"temperature": 0}}, "losses.temperature: .*greater than 0, got 0"),
        (
            {"losses": {"temperature": 2, "tail": "bucket"}},
            "temperature 2 needs the tail codes or uniform: a cache has the tail's total mass",
        ),
        ([1], "the recipe: must be a mapping of names to values"),
        ({"training": {"label_smoothing_factor": 0.1}}, "no label smoothing"),
        ({"training": {"group_by_length": True}}, "samples are read shard by shard"),
        ({"training": {"train_sampling_strategy": "group_by_length"}}, "samples are read shard by shard"),
        ({"training": {"ignore_data_skip": True}}, "continues with the exact next sample"),
        ({"training": {"fsdp": "full_shard"}}, "student.shard: true .--shard. shards the student with FSDP2"),
        ({"student": {"learning_rates": {"model": 0}}}, "student.learning_rates.model: .*greater than 0, got 0"),
        ({"student": {"lora": {"rank": 8}}}, r"unknown key 'student.lora.rank'; did you mean 'r'|known: r, alpha"),
    ],
)
def test_what_is_wrong_is_named(content, message):
    with pytest.raises(UsageError, match=message):
        make_recipe(content, "here")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_steps", "one", "training.max_steps: .*valid integer.*, got 'one'"),
        ("max_steps", 0, "training.max_steps: must be at least 1, or -1 for whole epochs, got 0"),
        ("num_train_epochs", 0, "training.num_train_epochs: must be more than 0, got 0"),
        ("num_train_epochs", -1, "training.num_train_epochs: must be more than 0, got -1"),
        ("per_device_train_batch_size", -4, "must be at least 1, got -4"),
        ("per_device_train_batch_size", [4], "training.per_device_train_batch_size: .*valid integer"),
        ("per_device_train_batch_size", 4.5, "training.per_device_train_batch_size: .*valid integer"),
        ("learning_rate", -1, "training.learning_rate: must be at least 0, got -1"),
        ("learning_rate", math.nan, "training.learning_rate: .*finite number"),
        ("learning_rate", {"a": 1}, "training.learning_rate: .*valid number"),
        ("weight_decay", None, "training.weight_decay: .*valid number, got None"),
        ("gradient_accumulation_steps", 0, "must be at least 1, got 0"),
        ("dataloader_num_workers", -1, "must be at least 0, got -1"),
        ("seed", -1, "must be at least 0, got -1"),
        ("save_steps", 0, "must be more than 0, got 0"),
        ("save_total_limit", -3, "must be at least 1, got -3"),
        ("bf16", "perhaps", "training.bf16: .*valid boolean.*, got 'perhaps'"),
        ("batch_size", 4, "not a field of .*did you mean 'per_device_train_batch_size'"),
        ("epochs", 4, "not a field of .*did you mean 'num_train_epochs'"),
    ],
)
def test_values_of_training_are_checked(field, value, message):
    with pytest.raises(UsageError, match=message):
        make_recipe({"training": {field: value}}, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rate": 1e-3}, "unknown key 'learning_rate'; it belongs in the section `training`"),
        ({"student": {"freeze": "model.vision_tower"}}, "student.freeze: must be a list, got 'model.vision_tower'"),
        ({"student": {"freeze": [""]}}, "student.freeze.0: .*at least 1 character"),
        ({"losses": [1]}, "losses: must be a mapping of names to values"),
        ({"losses": {"gamma": math.inf}}, "losses.gamma: .*finite number"),
    ],
)
def test_sections_are_checked(content, message):
    with pytest.raises(UsageError, match=message):
        make_recipe(content, "here")


def test_empty_sections_and_words_for_yes_and_no(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("losses:\nstudent:\ntraining:\n")
    assert load_recipe(path) == Recipe()
    assert make_recipe({"training": {"bf16": "false", "tf32": "yes"}}, "here").training == {"bf16": False, "tf32": True}


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {max_steps: 1}\nlosses: {alpha: 1}\ntraining: {max_steps: 2}\n")
    with pytest.raises(UsageError, match="the key 'training' occurs twice"):
        load_recipe(path)


def test_epochs_on_the_command_line_go_over_the_steps_of_a_file():
    recipe = make_recipe({"training": {"max_steps": 5}}, "here")
    assert with_flags(recipe, {"training.num_train_epochs": 2.0}).training == {"num_train_epochs": 2.0}
    both = {"training.num_train_epochs": 2.0, "training.max_steps": 7}
    assert with_flags(recipe, both).training == {"num_train_epochs": 2.0, "max_steps": 7}


def test_what_is_reserved_is_refused_each_for_its_reason():
    for name, reason in RESERVED.items():
        with pytest.raises(UsageError, match=f"training.{name} cannot be set: {re.escape(reason)}"):
            make_recipe({"training": {name: 1}}, "here")


class Caught(Exception):
    """Ends a command before it does anything."""


def recipe_flags(monkeypatch):
    """The recipe's key for each flag of train-student: each flag is given a value that no other has."""
    given = {name: object() for name, found in inspect.signature(train_student).parameters.items() if not found.default}
    keys = {}

    monkeypatch.setattr("emkd.commands.student.check_paths", lambda **paths: None)

    def catch(recipe, flags):
        keys.update(flags)
        raise Caught

    monkeypatch.setattr("emkd.trainer.load_recipe", lambda path: None)
    monkeypatch.setattr("emkd.trainer.with_flags", catch)
    with pytest.raises(Caught):
        train_student(**{**given, "student": "s", "data": "d", "output": Path("o")})
    return {flag: key for key, value in keys.items() for flag, own in given.items() if own is value}


def test_the_command_line_and_recipes_agree(monkeypatch):
    """Each flag sets one key of the recipe, and its help names the default of that key."""
    flags = recipe_flags(monkeypatch)
    assert len(flags) == 18
    command = typer.main.get_command(app).commands["train-student"]
    options = {option.name: option for option in command.params}
    arguments = training_arguments(Path("nowhere"), {})
    for flag, place in flags.items():
        section, _, name = place.rpartition(".")
        if section == "training":
            default = getattr(arguments, name)
            assert name in {field.name for field in dataclasses.fields(TrainingArguments)}
        else:
            default = getattr(getattr(Recipe(), section) if section else Recipe(), name)
        assert options[flag].default is None, "a flag that is not given must not override a file"
        stated = re.search(r"\(default ([^)]*)\)", options[flag].help)
        if stated is None:
            assert default in (None, (), -1, False), (flag, default)
        else:
            assert type(default)(stated[1]) == default, flag


def test_numbers_are_converted_only_where_a_number_is_meant():
    assert make_recipe({"training": {"run_name": "7", "weight_decay": "1e-1"}}, "here").training == {
        "run_name": "7",
        "weight_decay": 0.1,
    }


def test_files(tmp_path):
    with pytest.raises(InputNotFoundError, match="does not exist; expected a YAML file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputNotFoundError, match="is a folder; expected a YAML file"):
        load_recipe(tmp_path)
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
    with pytest.raises(UsageError, match="is not UTF-8 .*; save it as UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.slow
def test_a_divergence_reaches_the_objective(student_path, data_path, cache_path, tmp_path, capsys):
    """Each gives another loss after the same first step, and is named in the first log line and on the card."""
    from emkd.trainer import TrainSettings, train_student

    losses = {}
    for name, chosen in {
        "reverse": {},
        "forward": {"divergence": "forward_kl"},
        "jsd": {"divergence": "jsd"},
        "warm": {"divergence": "forward_kl", "temperature": 2.0},
    }.items():
        recipe = make_recipe({"losses": chosen, "training": {"max_steps": 1, "logging_steps": 1}}, "test")
        train_student(
            TrainSettings(
                student=str(student_path),
                data=str(data_path),
                cache=str(cache_path),
                output=tmp_path / name,
                recipe=recipe,
            )
        )
        said = capsys.readouterr().err
        line = dict(part.split(" ", 1) for part in said.split("step 1/1: ")[1].splitlines()[0].split(", "))
        losses[name] = {part: float(line[part]) for part in ("sup", "rld", "vsd", "vlad")}
        assert f", {recipe.losses.divergence}, tail uniform" in said
        assert ("temperature 2" in said) == (name == "warm")
        card = (tmp_path / name / "README.md").read_text()
        assert {"reverse": "reverse KL", "forward": "forward KL", "jsd": "Jensen-Shannon", "warm": "forward KL"}[
            name
        ] in card
        assert ("at temperature 2" in card) == (name == "warm")
    assert len({values["rld"] for values in losses.values()}) == len({values["vsd"] for values in losses.values()}) == 4
    assert len({(values["sup"], values["vlad"]) for values in losses.values()}) == 1


def test_the_cuda_solver_is_refused_here(student_path, data_path, cache_path, tmp_path):
    from emkd.trainer import TrainSettings, train_student

    recipe = make_recipe({"losses": {"solver": "cuda"}}, "test")
    settings = TrainSettings(
        student=str(student_path), data=str(data_path), cache=str(cache_path), output=tmp_path / "o", recipe=recipe
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="solver cuda needs an NVIDIA GPU"):
        train_student(settings)
