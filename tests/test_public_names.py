"""`__all__` of every package resolves, is sorted, and matches its lazy imports."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import emkd


def all_of(path):
    """The names of `__all__` as a file states them, None if it states none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


def path_of(module):
    return Path(importlib.util.find_spec(module).origin)


MODULES = [
    "emkd",
    *(found.name for found in pkgutil.walk_packages(emkd.__path__, "emkd.") if "__main__" not in found.name),
]
NAMED = [module for module in MODULES if all_of(path_of(module)) is not None]
PACKAGES = [module for module in NAMED if path_of(module).name == "__init__.py"]


def under_type_checking(path):
    """Name -> module of the imports that only type checkers see."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom):
                    found |= {alias.asname: line.module for alias in line.names if alias.asname == alias.name}
    return found


def test_the_public_packages():
    assert {
        "emkd",
        "emkd.demo",
        "emkd.inspection",
        "emkd.pipeline",
        "emkd.samples",
        "emkd.storage",
        "emkd.trainer",
    } <= set(PACKAGES)


@pytest.mark.parametrize("module", NAMED)
def test_each_name_is_there_and_they_are_sorted(module):
    names = all_of(path_of(module))
    assert names == sorted(names), "sort it"
    assert len(names) == len(set(names))
    loaded = importlib.import_module(module)
    for name in names:
        assert getattr(loaded, name) is not None, name
    with pytest.raises(AttributeError):
        getattr(loaded, "no_such" + "_name")


@pytest.mark.parametrize("module", PACKAGES)
def test_what_a_package_imports_for_others_is_public(module):
    """`__all__` has exactly the names that a package's `__init__` defines or imports lazily."""
    loaded = importlib.import_module(module)
    names = set(all_of(path_of(module)))
    lazy = under_type_checking(path_of(module))
    tree = ast.parse(path_of(module).read_text())
    here = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    eager = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith(module)
        for alias in node.names
    }
    offered = {name for name in here | lazy.keys() if not name.startswith("_")}
    assert offered <= names <= offered | eager
    homes = getattr(loaded, "_HOMES", None)
    if homes is not None:
        prefix = "" if module == "emkd" else f"{module}."
        assert {name: prefix + home for name, home in homes.items()} == lazy
    for name, home in lazy.items():
        assert getattr(importlib.import_module(home), name) is getattr(loaded, name)


def test_dir_of_emkd_lists_them():
    assert dir(emkd) == sorted(emkd.__all__)
