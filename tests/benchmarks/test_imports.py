"""Every benchmark imports, also the imports inside its functions, which run only by hand."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("[!_]*.py")
)


def imported(module: str) -> list[tuple[str, str]]:
    """(module, name) of everything that a module imports by name from benchmarks or emkd, functions included."""
    tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return [
        (node.module, alias.name)
        for node in found
        if node.module.split(".")[0] in ("benchmarks", "emkd")
        for alias in node.names
    ]


def exists(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    is_package = hasattr(found, "__path__")
    return hasattr(found, name) or (is_package and importlib.util.find_spec(f"{module}.{name}") is not None)


@pytest.mark.parametrize("module", MODULES)
def test_what_a_benchmark_imports_exists(module):
    importlib.import_module(module)
    assert [pair for pair in imported(module) if not exists(*pair)] == []


def test_there_is_something_to_check():
    assert ("emkd.storage", "Cache") in imported("benchmarks.storage.reading")
    assert ("emkd.storage.lifecycle.seal", "seal") in imported("benchmarks.storage.million_samples")
    assert not exists("benchmarks.storage.reading", "manifest")


def test_the_readme_names_every_script_and_no_other():
    """A script is a module with a main function."""
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {
        name for name in MODULES if "\ndef main()" in (ROOT / Path(*name.split("."))).with_suffix(".py").read_text()
    }
    named = {line.split("`")[1] for line in readme.splitlines() if line.startswith("| `benchmarks.")}
    helpers = {
        "benchmarks.storage.reading_forms",
        "benchmarks.storage.reading_systems",
        "benchmarks.storage.read_cache",
    }
    assert named == scripts - helpers
