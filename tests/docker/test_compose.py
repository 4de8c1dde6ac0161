"""compose.yaml agrees with itself, with the Dockerfile, and with the command lines of ray and emkd."""

import re

import pytest

from tests.docker.compose_file import ROOT, command_lines, compose, parse

DOCKER = ROOT / "docker"
SERVICES = compose()["services"]
README = (DOCKER / "README.md").read_text()


def test_one_service_builds_the_image_and_no_service_pulls_it():
    assert {service["image"] for service in SERVICES.values()} == {"emkd:local"}
    built = {name: service["build"] for name, service in SERVICES.items() if "build" in service}
    assert list(built) == ["ray-head"]
    assert (DOCKER / built["ray-head"]["context"] / built["ray-head"]["dockerfile"]).is_file()
    assert all(service["pull_policy"] == ("build" if "build" in service else "never") for service in SERVICES.values())


@pytest.mark.parametrize("name", SERVICES)
def test_services_share_volumes_and_token_and_none_runs_as_root(name):
    service = SERVICES[name]
    assert "user" not in service  # the Dockerfile's user, who is not root
    assert not service.get("privileged")
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["shm_size"]
    targets = dict(mount.split(":") for mount in service["volumes"])
    assert targets.keys() == compose()["volumes"].keys()
    made = re.search(r"install --directory .*", (DOCKER / "Dockerfile").read_text())[0]
    assert all(f" {target}" in made for target in targets.values())  # else a new volume belongs to root
    assert service["environment"]["HF_HOME"].startswith(targets["shared"])


def test_one_port_that_is_not_published():
    text = (DOCKER / "compose.yaml").read_text()
    assert not any("ports" in service for service in SERVICES.values())
    assert set(re.findall(r"ray-head:(\d+)", text)) == set(re.findall(r"--port=(\d+)", text)) == {"6379"}


def test_services_wait_for_services_that_report_their_health():
    healthy = {"condition": "service_healthy"}
    waits = [SERVICES[name].get("depends_on") for name in ("ray-head", "ray-worker", "demo")]
    assert waits == [None, {"ray-head": healthy}, {"ray-worker": healthy}]
    assert all("healthcheck" in SERVICES[name] for name in ("ray-head", "ray-worker"))


@pytest.mark.parametrize("name", SERVICES)
def test_ray_and_emkd_understand_the_command_lines(name):
    lines = [words for words in command_lines(SERVICES[name]) if words[0] != "grep"]
    assert lines
    for words in lines:
        parse(words)


@pytest.mark.parametrize("line", ["emkd demo --nothing", "emkd demo --seeds 0", "ray start --adress=ray-head:6379"])
def test_a_wrong_command_line_is_noticed(line):
    with pytest.raises(Exception) as raised:  # noqa: PT011  ray's click and typer's share no class of errors
        parse(line.split())
    assert hasattr(raised.value, "format_message")


def test_the_output_folder_of_the_demo_can_be_chosen():
    chosen = compose(DEMO_OUT="/shared/second")["services"]["demo"]
    assert "--out=/shared/second" in command_lines(chosen)[-1]


def test_the_readme_names_files_and_services_that_exist_and_commands_that_parse():
    named = re.findall(r"`(docker/[\w./]+)`", README) + re.findall(r"--file (docker/[\w./]+)", README)
    assert [name for name in named if not (ROOT / name).exists()] == []
    found = re.findall(r" exec (\S+) (emkd .*)", README)
    assert len(found) == 2
    for service, line in found:
        assert service in SERVICES
        parse(line.split())
