"""What a user installs: sdist and wheel are built, the wheel goes into an empty environment and runs there."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile

import pytest

import emkd
from tests.figures import ROOT

pytestmark = pytest.mark.slow

COPIED = ("emkd", "LICENSE", "README.md", "pyproject.toml")


def ran(command, folder, **variables):
    """What a command printed. Nothing of the checkout is on its path."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=inherited | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with an sdist and a wheel, the wheel built from the sdist."""
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", *COPIED], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    dist = tmp_path_factory.mktemp("dist")
    ran([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source], source)
    return dist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """bin/ of an environment with the wheel. It sees our dependencies, and not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (wheel,) = built.glob("*.whl")
    python = folder / "bin" / "python"
    site = ran([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    ran(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel],
        folder,
    )
    # Plain lines of a .pth file are folders; those that this environment's own .pth files add are named, too.
    dependencies = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    with open(f"{site}/dependencies.pth", "w") as file:
        file.write("\n".join(dependencies) + "\n")
    return folder / "bin"


def test_the_wheel_has_licence_types_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "emkd/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"emkd", f"emkd-{emkd.__version__}.dist-info"}
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "emkd").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    recipes = {file.relative_to(ROOT).as_posix() for file in (ROOT / "emkd").rglob("*.yaml")}
    assert {name for name in names if name.endswith(".yaml")} == recipes
    assert "emkd/recipes/phase2-emkd.yaml" in recipes


def test_the_sdist_is_enough_to_build_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "emkd/py.typed", "emkd/cli.py", "emkd/recipes/demo.yaml"} <= names


def test_it_runs_in_another_folder(installed, tmp_path):
    where = ran([installed / "python", "-c", "import emkd; print(emkd.__file__)"], tmp_path).strip()
    assert where.startswith(str(installed.parent))
    assert "cache-teacher" in ran([installed / "emkd", "--help"], tmp_path)
    assert ran([installed / "emkd", "--version"], tmp_path).strip() == f"emkd {emkd.__version__}"
    assert "train-student" in ran([installed / "python", "-m", "emkd", "--help"], tmp_path)
    used = "import emkd; print(emkd.Cache.__module__, emkd.train_student.__name__)"
    assert ran([installed / "python", "-c", used], tmp_path).split() == ["emkd.storage.cache", "train_student"]


def test_what_it_needs_to_build_and_to_run_is_in_a_registry():
    """No dependency is a URL, a path or a repository: an environment with a package registry alone can install it."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = [name for names in found["project"]["optional-dependencies"].values() for name in names]
    needed = [*found["build-system"]["requires"], *found["project"]["dependencies"], *optional]
    assert [name for name in needed if "@" in name or "/" in name] == []


def test_help_recipes_and_a_recipe_by_name_without_the_checkout(installed, tmp_path):
    emkd_command = installed / "emkd"
    assert "--seeds" in ran([emkd_command, "demo", "--help"], tmp_path)
    assert "recipes" in ran([emkd_command, "--help"], tmp_path)
    listed = ran([emkd_command, "recipes"], tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == sorted(p.stem for p in (ROOT / "emkd").rglob("*.yaml"))
    printed = ran([emkd_command, "recipes", "phase2-emkd"], tmp_path)
    assert printed == (ROOT / "emkd" / "recipes" / "phase2-emkd.yaml").read_text()
    used = "from emkd.trainer import load_recipe; print(load_recipe('phase2-lora').student.lora.r)"
    assert ran([installed / "python", "-c", used], tmp_path).strip() == "64"
