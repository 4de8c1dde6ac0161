"""Benchmarks run by hand, now and then: what they import must be there all the same."""

import ast
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.stem: ast.parse(path.read_text()) for path in sorted(BENCHMARKS.glob("*.py"))}


def imported(script: str) -> list[tuple[str, str]]:
    """(module, name) of all that a script imports from ours, wherever it does."""
    found = [node for node in ast.walk(SCRIPTS[script]) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [node for node in found if node.module in SCRIPTS or node.module.split(".")[0] == "emkd"]
    return [(node.module, alias.name) for node in ours for alias in node.names]


def defined(script: str) -> set[str]:
    """Names at the top level of a script, those that it imports included."""
    names: set[str] = set()
    for node in SCRIPTS[script].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    return names


def is_there(module: str, name: str) -> bool:
    if module in SCRIPTS:
        return name in defined(module)
    found = importlib.import_module(module)
    return hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_benchmark_imports_is_there(script):
    assert [pair for pair in imported(script) if not is_there(*pair)] == []


def test_there_is_something_to_check():
    assert ("emkd.storage", "Cache") in imported("reading")
    assert ("reading_prepare", "manifest") in imported("cache_bytes")
    assert is_there("reading_prepare", "manifest")
    assert not is_there("reading", "manifest")
