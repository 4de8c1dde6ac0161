"""Runs the steps of the Dockerfile in a new virtual environment below a folder, in place of an image.

    image/<path>    what the image would have at /<path>: WORKDIR and COPY go here
    venv/           stands for the image's Python: `pip` and what it installs
    home/           HOME while building; nothing may be left in it

RUN steps are split at `&&`. A part runs here if it names no absolute path and no program that needs an image
of its own (useradd, install, apt-get, ...); the others are reported as not run.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from image_checks.dockerfile import Ignore, Step, StepError, copied_files, environment, only, parse

# Programs that change a whole system: they have a meaning in an image only.
OF_THE_IMAGE = {"useradd", "groupadd", "adduser", "install", "chown", "apt-get", "apt", "ldconfig"}
# A path that does not start from the working folder: on this machine it would be something else.
OUTSIDE = re.compile(r"(?<![\w.)}-])[/~]|\.\.|\$")
# From the caller's environment: what says how to reach the network, and where scratch space is.
KEPT = re.compile(r"PIP_.*|SSL_CERT_.*|REQUESTS_CA_BUNDLE|(https?|no|all)_proxy|TMPDIR|LANG", re.IGNORECASE)

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What later checks need: where things are, and what the image would say about itself."""

    folder: Path
    env: Mapping[str, str]
    user: str
    entrypoint: list[str]


def build(context: Path, dockerfile: Path, folder: Path, base_python: str, say: Say) -> Built:
    """Runs all steps in `folder`. Raises StepError where one fails; `finished` marks a whole build."""
    steps = parse(dockerfile.read_text())
    ignore = Ignore(dockerfile.with_name(dockerfile.name + ".dockerignore").read_text())
    image, home, finished = folder / "image", folder / "home", folder / "finished"
    env = _environment(steps, folder)
    if finished.exists():
        say(f"build: {folder} holds a finished build; its steps are not run again")
    else:
        home.mkdir(parents=True)
        _check_base(steps[0], base_python)
        subprocess.run([base_python, "-m", "venv", folder / "venv"], check=True)
        _run_all(steps, context, ignore, image, env, say)
        _check_leftovers(home, folder)
        finished.touch()
        say("build: no cache was left in HOME")
    return Built(
        folder=folder,
        env=env,
        user=only(steps, "USER").text,
        entrypoint=only(steps, "ENTRYPOINT").json_list(),
    )


def _run_all(steps: list[Step], context: Path, ignore: Ignore, image: Path, env: dict[str, str], say: Say) -> None:
    workdir = "/"
    for step in steps:
        here = image / workdir.lstrip("/")
        here.mkdir(parents=True, exist_ok=True)
        if step.name == "WORKDIR":
            workdir = step.text
        elif step.name == "COPY":
            say(f"COPY {step.text}: {_copy(step, context, ignore, here)} files")
        elif step.name == "RUN":
            _run(step, here, env, say)
        else:
            say(f"{step.name} {step.text}: taken up")


def _copy(step: Step, context: Path, ignore: Ignore, here: Path) -> int:
    *sources, target = step.words()
    if Path(target).is_absolute():
        raise StepError(f"line {step.line}: COPY to an absolute path is not known to these checks")
    count = 0
    for source in sources:
        for path in copied_files(context, source, ignore):
            inside = path.relative_to(source) if (context / source).is_dir() else Path(path.name)
            (here / target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(context / path, here / target / inside)
            count += 1
    return count


def _run(step: Step, here: Path, env: dict[str, str], say: Say) -> None:
    for part in step.text.split("&&"):
        words = shlex.split(part)
        if words[0] in OF_THE_IMAGE:
            say(f"RUN {part.strip()}: NOT RUN, it needs root in an image")
        elif OUTSIDE.search(part):
            say(f"RUN {part.strip()}: NOT RUN, it names a path outside of the working folder")
        else:
            say(f"RUN {part.strip()}")
            _quietly(["sh", "-euc", part], here, env)


def _quietly(command: list[str], here: Path, env: dict[str, str]) -> None:
    """Shows the end of the output where the command fails."""
    done = subprocess.run(
        command, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise StepError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")


def _environment(steps: list[Step], folder: Path) -> dict[str, str]:
    """The image's ENV, a new HOME, the environment's Python first on PATH, and how to reach the network."""
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    configured = Path("~/.config/pip/pip.conf").expanduser()
    if configured.is_file():
        kept.setdefault("PIP_CONFIG_FILE", str(configured))
    path = f"{folder / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    return {**kept, **environment(steps), "HOME": str(folder / "home"), "PATH": path}


def _check_base(step: Step, base_python: str) -> None:
    """The stand-in must be the Python of the image, at least by its minor version."""
    asked = re.fullmatch(r"python:(\d+\.\d+)-slim", step.text)
    if step.name != "FROM" or asked is None:
        raise StepError(f"line {step.line}: expected FROM python:<minor>-slim, got {step.name} {step.text}")
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    got = subprocess.run([base_python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    if got != asked[1]:
        raise StepError(f"the image has Python {asked[1]} and {base_python} is {got}; name one by BASE_PYTHON")


def _check_leftovers(home: Path, folder: Path) -> None:
    left = [str(path.relative_to(folder)) for path in home.rglob("*") if path.is_file()]
    left += [
        str(path.relative_to(folder)) for name in ("build", "*.egg-info") for path in folder.glob(f"image/**/{name}")
    ]
    if left:
        raise FileExistsError(f"the build left {len(left)} files behind, the first is {left[0]}")
