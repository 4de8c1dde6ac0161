"""The Dockerfile and its .dockerignore agree with the repository. No image is built."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps() -> list[tuple[str, str]]:
    """(instruction, arguments) of each step; continuation lines are joined, comments are dropped."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


STEPS = steps()


def arguments(name: str) -> list[str]:
    return [text for step, text in STEPS if step == name]


def sources() -> list[str]:
    return [source for text in arguments("COPY") for source in text.split()[:-1]]


def test_dependencies_are_installed_before_the_package_is_copied_and_the_user_changes_last():
    assert " ".join(step for step, _ in STEPS) == ("FROM ENV RUN WORKDIR COPY RUN COPY RUN USER WORKDIR ENTRYPOINT CMD")
    first, second = arguments("COPY")
    assert {"pyproject.toml", "constraints.txt"} <= set(first.split())
    assert second == "emkd emkd"


def test_dependencies_are_installed_as_pinned():
    installs = [part.strip() for text in arguments("RUN") for part in text.split("&&") if "pip install" in part]
    pinned, package = "pip install --constraint constraints.txt .", "pip install --no-deps --force-reinstall ."
    assert installs == [pinned, package]


def test_the_empty_package_of_the_dependency_layer_can_be_built(tmp_path):
    for source in arguments("COPY")[0].split()[:-1]:
        shutil.copy(ROOT / source, tmp_path)
    make_package, _, _ = arguments("RUN")[1].partition("&& pip install")
    subprocess.run(["sh", "-euc", make_package], cwd=tmp_path, check=True)
    # Without site (-S) and PYTHONPATH (-I), so that the checkout's emkd cannot be imported in place of the empty one.
    site = sysconfig.get_path("purelib")
    build = f"import sys; sys.path.append({site!r})\nfrom setuptools import build_meta\n"
    build += "print(build_meta.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_base_is_the_oldest_python_that_the_project_supports():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert arguments("FROM") == [f"python:{oldest}-slim"]


def test_runs_emkd_as_a_user_that_it_makes():
    (user,) = arguments("USER")
    assert user not in ("root", "0")
    make_user = arguments("RUN")[0]
    assert re.search(rf"useradd --create-home --uid [1-9]\d* {user}\b", make_user)
    assert f"--owner={user}" in make_user
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["emkd"]
    env = dict(pair.split("=") for pair in arguments("ENV")[0].split())
    assert env.items() >= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items()


def test_the_build_sees_exactly_what_it_copies_and_copies_what_the_package_needs():
    """.dockerignore excludes everything, then lets through what COPY names, then excludes leftovers in it."""
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    kept = [f"!{source}" for source in sources()]
    assert rules == ["*", *kept, "**/__pycache__", "**/*.egg-info"]
    assert all((ROOT / source).exists() for source in sources())
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "emkd"} <= set(sources())
