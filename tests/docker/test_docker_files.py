"""The files in docker/ agree with the repository and with the command lines that exist. Nothing is built."""

import re
from pathlib import Path
from typing import Any

import pytest
from image_checks.build import OUTSIDE
from image_checks.compose import CommandError, Compose, commands, load, parse_command, problems
from image_checks.dockerfile import Ignore, StepError, copied_files, environment, only, parse

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
STEPS = parse((DOCKER / "Dockerfile").read_text())
IGNORE = Ignore((DOCKER / "Dockerfile.dockerignore").read_text())


@pytest.fixture
def compose() -> Compose:
    return load(DOCKER / "compose.yaml", {})


def copied() -> set[str]:
    sources = [source for step in STEPS if step.name == "COPY" for source in step.words()[:-1]]
    return {path.as_posix() for source in sources for path in copied_files(ROOT, source, IGNORE)}


def test_dependencies_are_installed_as_pinned() -> None:
    parts = [part.strip() for step in STEPS if step.name == "RUN" for part in step.text.split("&&")]
    installs = [part for part in parts if part.startswith("pip install")]
    assert installs
    assert all("--constraint constraints.txt" in part or "--no-deps" in part for part in installs)
    assert "--constraint constraints.txt" in installs[0]
    assert "constraints.txt" in copied()


def test_runs_as_a_user_that_it_makes() -> None:
    user = only(STEPS, "USER").text
    assert user not in {"root", "0"}
    assert any(step.name == "RUN" and re.search(rf"useradd .*\b{user}\b", step.text) for step in STEPS)
    # Nothing is installed after the user changes, so root's steps are all before it.
    assert [step.name for step in STEPS[STEPS.index(only(STEPS, "USER")) :]] == [
        "USER",
        "WORKDIR",
        "ENTRYPOINT",
        "CMD",
    ]


def test_starts_emkd_with_one_thread_and_no_usage_report() -> None:
    assert only(STEPS, "ENTRYPOINT").json_list() == ["emkd"]
    parse_command(["emkd", "inspect", "cache"])
    env = environment(STEPS)
    assert (env["OMP_NUM_THREADS"], env["RAY_USAGE_STATS_ENABLED"], env["PIP_NO_CACHE_DIR"]) == (
        "1",
        "0",
        "1",
    )


def test_base_is_a_python_that_the_project_supports() -> None:
    found = re.fullmatch(r"python:3\.(\d+)-slim", only(STEPS, "FROM").text)
    assert found is not None
    assert int(found[1]) >= 11


def test_copies_the_package_and_what_building_it_needs() -> None:
    files = copied()
    assert {"pyproject.toml", "README.md", "LICENSE", "emkd/cli.py", "emkd/py.typed"} <= files
    assert not [name for name in files if "__pycache__" in name or name.startswith(("tests/", ".", "docker/"))]
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "emkd").rglob("*.py")}
    assert package <= files


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("emkd/cli.py", False),
        ("emkd/storage/cache.py", False),
        ("pyproject.toml", False),
        ("emkd/__pycache__/cli.cpython-311.pyc", True),
        ("emkd/storage/__pycache__/x.pyc", True),
        ("tests/conftest.py", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("demo-out/results.json", True),
        ("emkd.egg-info/PKG-INFO", True),
    ],
)
def test_dockerignore(path: str, ignored: bool) -> None:
    assert IGNORE.ignored(path) is ignored


def test_last_fitting_pattern_decides() -> None:
    rules = Ignore("# comment\n*.md\n!README.md\n**/secret\n/data/?.bin")
    assert [rules.ignored(path) for path in ("a.md", "README.md", "docs/a.md")] == [True, False, False]
    assert [rules.ignored(path) for path in ("secret", "a/b/secret/c", "data/1.bin", "data/12.bin")] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("text", ["ADD . /src", "RUN --mount=type=cache,target=/x pip list", "RUN <<EOF\nls\nEOF"])
def test_steps_that_the_checks_do_not_know_are_refused(text: str) -> None:
    with pytest.raises(StepError, match="not known"):
        parse(text)


def test_comments_and_continuations() -> None:
    steps = parse("# one\nRUN a \\\n    # between\n    && b\n\nENV X=1 Y='2 3'\n")
    assert [(step.name, step.text, step.line) for step in steps] == [
        ("RUN", "a && b", 2),
        ("ENV", "X=1 Y='2 3'", 6),
    ]
    assert environment(steps) == {"X": "1", "Y": "2 3"}


def test_compose_is_right(compose: Compose) -> None:
    assert problems(compose) == []
    assert {"ray-head", "ray-worker", "demo"} <= compose.services.keys()
    assert [line.split()[0] for line in commands(compose.services["demo"])] == ["ray", "emkd"]


def test_all_services_share_image_volume_and_token(compose: Compose) -> None:
    for service in compose.services.values():
        assert service["image"] == compose.services["ray-head"]["image"]
        assert "shared:/shared" in service["volumes"]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["shm_size"]


def test_output_folder_of_the_demo_can_be_chosen() -> None:
    chosen = load(DOCKER / "compose.yaml", {"DEMO_OUT": "/shared/second"})
    assert '--out="/shared/second"' in commands(chosen.services["demo"])[-1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"user": "root"}, "runs as root"),
        ({"user": "0:0"}, "runs as root"),
        ({"image": "other"}, "no service builds its image other"),
        ({"pull_policy": "always"}, "must not be pulled"),
        ({"volumes": ["nowhere:/x"]}, "volume nowhere is not declared"),
        ({"depends_on": {"nobody": {"condition": "service_started"}}}, "nobody, which is no service"),
        ({"depends_on": {"ray-head": {"condition": "ready"}}}, "ready is no condition"),
        ({"depends_on": {"demo": {"condition": "service_healthy"}}}, "has no health check"),
        ({"command": ["start", "--adress=ray-head:6379"]}, "No such option"),
        ({"command": ["start", "--num-cpus=two"]}, "not a valid integer"),
        ({"healthcheck": {"test": ["CMD", "curl", "localhost"]}}, "curl is not known"),
    ],
)
def test_what_is_wrong_is_found(compose: Compose, change: dict[str, Any], problem: str) -> None:
    wrong = {**compose.services, "ray-worker": {**compose.services["ray-worker"], **change}}
    found = problems(Compose(folder=compose.folder, services=wrong, volumes=compose.volumes))
    assert any(problem in line for line in found), found


@pytest.mark.parametrize("line", ["emkd nothing", "emkd demo --nothing", "emkd demo --seeds 0", "ray nothing", "ls"])
def test_unknown_command_lines(line: str) -> None:
    with pytest.raises(CommandError):
        parse_command(line.split())


def test_readme_names_files_and_services_that_exist(compose: Compose) -> None:
    text = (DOCKER / "README.md").read_text()
    named = set(re.findall(r"`(docker/[\w./]+)`", text)) | set(re.findall(r"--file (docker/[\w./]+)", text))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if found := re.search(r" exec (\S+) (emkd .*)", line):
                assert found[1] in compose.services
                parse_command(found[2].split("#")[0].split())


@pytest.mark.parametrize(
    ("part", "outside"),
    [
        ("touch emkd/__init__.py", False),
        ("pip install --constraint constraints.txt .", False),
        ("rm -r /usr", True),
        ("rm -r ~/x", True),
        ("rm -r ../x", True),
        ("rm -r $HOME", True),
        ("echo x >/etc/x", True),
        ("tool --out=/etc/x", True),
        ("tool '/etc/x'", True),
    ],
)
def test_steps_that_reach_outside_are_not_run_on_this_machine(part: str, outside: bool) -> None:
    assert bool(OUTSIDE.search(part)) is outside
