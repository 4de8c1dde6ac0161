"""Recipes are found by name, listed and printed by `emkd recipes`."""

from pathlib import Path

import pytest
import yaml

from emkd.cli import main
from emkd.errors import InputNotFoundError
from emkd.recipes import recipe_names, recipe_text, summary
from emkd.trainer.recipe.recipe import load_recipe, make_recipe

FOLDER = Path(__file__).parents[1] / "emkd" / "recipes"
NAMES = ["demo", "demo-align", "phase1-align", "phase2-emkd", "phase2-lora"]


def printed(capfd, *arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert not left.value.code
    return capfd.readouterr().out


def test_the_names_are_those_of_the_files():
    assert recipe_names() == NAMES == sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_the_list_has_one_line_each(capfd):
    lines = printed(capfd, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert "Phase 2: EM-KD, trains the whole student from the teacher's cache." in lines[3]
    assert all(line.endswith(".") and len(line) <= 120 for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_one_is_printed_byte_by_byte_and_can_be_used_as_a_file(name, capfd, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(printed(capfd, "recipes", name))
    assert file.read_bytes() == (FOLDER / f"{name}.yaml").read_bytes()
    assert load_recipe(file) == load_recipe(str(file)) == load_recipe(name)
    assert load_recipe(name) == make_recipe(yaml.safe_load(file.read_text()), "test")
    assert summary(name) in " ".join(file.read_text().replace("#", " ").split())


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phase2-lora").mkdir()  # a student's folder, for example: no recipe
    assert load_recipe("phase2-lora").student.lora is not None
    (tmp_path / "phase2-emkd").write_text("losses: {beta: 7}")
    assert load_recipe("phase2-emkd").losses.beta == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phase2-emdk", "does not exist.* did you mean 'phase2-emkd'.* demo, demo-align, phase1-align, phase2-emkd"),
        ("phase2-lora.yaml", "did you mean 'phase2-lora'"),
        ("recipes/phase2-emkd.yaml", "did you mean 'phase2-emkd'"),
        ("../recipes/demo", "does not exist"),
        ("xyz", "a name; recipes of emkd: demo, demo-align"),
    ],
)
def test_what_is_neither_names_what_there_is(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputNotFoundError, match=message):
        load_recipe(name)


def test_a_wrong_name_on_the_command_line(capfd):
    with pytest.raises(SystemExit) as left:
        main(["recipes", "phase2"])
    assert left.value.code == 2
    assert "emkd has no recipe 'phase2'; did you mean 'phase" in capfd.readouterr().err
    with pytest.raises(InputNotFoundError):
        recipe_text("__init__")
