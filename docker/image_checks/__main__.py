"""All checks in order, one line each; ends with 1 at the first that fails. check.sh says how to call it."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from image_checks.build import Built, build
from image_checks.cluster import Cluster, ClusterError, cluster
from image_checks.compose import Compose, load, problems
from image_checks.dockerfile import StepError

DOCKER = Path(__file__).resolve().parent.parent
NOT_CHECKED = """\
not checked here, because it needs a Docker engine:
  the base image itself; steps marked NOT RUN above; the size and the layers of the image
  that BuildKit reads Dockerfile.dockerignore as these checks do
  names, networks, volumes and their owners, shm_size, init, profiles and the order of `docker compose up`
  more than one machine; a GPU in a container"""

IMPORT_ALL = """
import importlib, pkgutil, emkd
names = [module.name for module in pkgutil.walk_packages(emkd.__path__, "emkd.")]
for name in names:
    importlib.import_module(name)
paths = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line and "lib-dynload" not in line}
system = {path.rsplit("/", 1)[1].split(".so")[0] for path in paths if path.startswith(("/lib", "/usr/lib"))}
print(f"{len(names)} modules of {emkd.__path__[0]}; they load from the system: {', '.join(sorted(system))}")
"""

# An untrained teacher and a few rows: enough for a job that goes through everything.
MAKE_JOB = """
from pathlib import Path
from emkd.demo.models import new_processor, new_teacher, save_model
from emkd.demo.scenes import write_scenes
save_model(new_teacher(seed=0), new_processor(), Path("teacher"))
write_scenes(Path("rows.parquet"), 12, "train", 1, wrong_answers=0.0)
"""
JOB = [
    *("emkd", "cache-teacher", "--teacher", "teacher", "--data", "rows.parquet", "--cache", "cache"),
    *("--gpus-per-worker", "0", "--rows-per-shard", "4", "--address"),
]


def main() -> int:
    options = _options()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="emkd-image-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # what runs as another user has to find the environment in it
    try:
        compose = _check_files()
        built = build(DOCKER.parent, DOCKER / "Dockerfile", folder.resolve(), options.base_python, _say)
        _check_installed(built)
        if options.cluster:
            _check_cluster(compose, built, options.demo)
    except (ClusterError, StepError, OSError, subprocess.SubprocessError) as error:
        _say(f"FAILED: {error}")
        return 1
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    _say(NOT_CHECKED)
    _say("all checks that can be made here have passed")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="docker/check.sh", description="Checks docker/ without a Docker engine.")
    parser.add_argument("--base-python", default="python3.11", help="the interpreter that stands for the base image")
    parser.add_argument("--keep", type=Path, help="build in this folder and keep it; a finished build is used again")
    parser.add_argument("--no-cluster", dest="cluster", action="store_false", help="start no Ray")
    parser.add_argument("--demo", action="store_true", help="run the demo service too: some minutes")
    return parser.parse_args()


def _check_files() -> Compose:
    compose = load(DOCKER / "compose.yaml", os.environ)
    found = problems(compose)
    if found:
        raise StepError("compose.yaml: " + "; ".join(found))
    checked = "images, users, volumes, dependencies and command lines are right"
    _say(f"compose.yaml: {', '.join(compose.services)}: {checked}")
    return compose


def _check_installed(built: Built) -> None:
    if built.user in {"root", "0"}:
        raise StepError(f"the image's user is {built.user}")
    _say(f"the image's user is {built.user}")
    n_lines = len(_output(built, [*built.entrypoint, "--help"]).splitlines())
    _say(f"{' '.join(built.entrypoint)} --help: {n_lines} lines")
    _say(f"imports: {_output(built, ['python', '-c', IMPORT_ALL]).strip()}")
    _say(f"pip check: {_output(built, ['pip', 'check']).strip()}")
    names = {"pip", "setuptools", "emkd"}
    pinned = {_canonical(line) for line in (DOCKER.parent / "constraints.txt").read_text().splitlines()}
    got = {_canonical(line) for line in _output(built, ["pip", "list", "--format=freeze"]).splitlines()}
    loose = sorted(line for line in got - pinned if line.partition("==")[0] not in names)
    if loose:
        raise StepError(f"installed, but not as constraints.txt pins it: {', '.join(loose)}")
    _say(f"constraints.txt: pins all of {len(got)} distributions but {', '.join(sorted(names))}")


def _canonical(line: str) -> str:
    name, _, version = line.partition("==")
    return f"{name.lower().replace('_', '-')}=={version}"


def _output(built: Built, command: list[str]) -> str:
    """What a command of the built environment prints. Raises StepError where it fails."""
    env = dict(built.env)
    program = shutil.which(command[0], path=str(built.folder / "venv" / "bin"))
    if program is None:
        raise StepError(f"{command[0]} was not installed")
    done = subprocess.run(
        [program, *command[1:]], env=env, cwd=built.folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StepError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def _check_cluster(compose: Compose, built: Built, demo: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="emkd-ray-", dir="/tmp"))
    try:
        with cluster(compose, built, folder, _say) as services:
            _say(
                "services run as " + ("nobody, not as root" if services.user is not None else "the user of this check")
            )
            services.start("ray-worker")
            _check_job(services)
            if demo:
                _check_demo(services)
        _say("cluster: ended, no process of it is left")
    finally:
        shutil.rmtree(folder)


def _check_job(services: Cluster) -> None:
    started = time.monotonic()
    python = str(services.built.folder / "venv" / "bin" / "python")
    services.run("ray-worker", [python, "-c", MAKE_JOB], timeout_s=120)
    emkd = str(services.built.folder / "venv" / "bin" / "emkd")
    sealed = services.run("ray-worker", [emkd, *JOB[1:], services.address], timeout_s=180).splitlines()[-1]
    services.run("ray-worker", [emkd, "inspect", "cache", "--verify"], timeout_s=60)
    _say(f"job on the cluster, {time.monotonic() - started:.0f} s: {sealed}")


def _check_demo(services: Cluster) -> None:
    started = time.monotonic()
    services.start("demo")
    services.wait("demo", timeout_s=1200)
    results = json.loads((services.shared / "demo" / "results.json").read_text())
    _say(f"demo on the cluster, {time.monotonic() - started:.0f} s: {json.dumps(results)}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
