"""Messages of the installed package cite no file that is not installed: docs/, benchmarks/ and tests/ stay behind."""

import ast
import re

import pytest
import typer

from emkd.cli import app
from tests.figures import ROOT

NOT_INSTALLED = re.compile(
    r"\b(?:docs|benchmarks|tests|tools|docker)/\w|(?<![\w/])recipes/\w|\b(?:CONTRIBUTING|CHANGELOG)\.md"
)


def texts(path):
    """The texts of a module without docstrings: what it may print or write."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_text_of_the_package_cites_what_is_not_installed():
    cited = {
        (path.relative_to(ROOT).as_posix(), text)
        for path in (ROOT / "emkd").rglob("*.py")
        for text in texts(path)
        if NOT_INSTALLED.search(text)
    }
    assert cited == set()


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_no_help_cites_what_is_not_installed(name):
    command = typer.main.get_command(app).commands[name]
    for text in (command.help, *(getattr(option, "help", None) for option in command.params)):
        assert not NOT_INSTALLED.search(text or ""), text


def test_no_recipe_cites_what_is_not_installed():
    for path in (ROOT / "emkd" / "recipes").glob("*.yaml"):
        assert not NOT_INSTALLED.search(path.read_text()), path


@pytest.mark.parametrize(
    "text", ["see docs/data.md", "(benchmarks/results/x.json)", "recipes/demo.yaml", "in CONTRIBUTING.md"]
)
def test_what_is_looked_for_is_found(text):
    assert NOT_INSTALLED.search(text)
