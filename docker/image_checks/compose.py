"""Reads compose.yaml and checks it against the repository, the image and the command lines that really exist.

    load(path, env)                the services, with ${NAME:-default} filled in and $$ turned into $
    problems(services, ...)        what is wrong, one line each; an empty list is good
    commands(service)              every command line that a service runs, its health check included
    parse_command(words)           raises CommandError where ray, emkd or grep would not understand it

Command lines are parsed by the programs' own parsers and not run.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REFERENCE = re.compile(r"\$\$|\$\{(\w+):-([^}]*)\}")
# A word of the shell that is no option of the program: a redirection.
REDIRECTIONS = ("> /dev/null",)
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


class CommandError(ValueError):
    """A command line that its program would refuse."""


@dataclass(frozen=True, kw_only=True)
class Compose:
    """The file as Docker would see it."""

    folder: Path
    services: Mapping[str, Mapping[str, Any]]
    volumes: Mapping[str, Any]


def load(path: Path, env: Mapping[str, str]) -> Compose:
    content = _filled(yaml.safe_load(path.read_text()), env)
    return Compose(folder=path.parent, services=content["services"], volumes=content.get("volumes", {}))


def _filled(value: Any, env: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, env) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, env) for item in value]
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: "$" if found[0] == "$$" else env.get(found[1]) or found[2], value)
    return value


def problems(compose: Compose) -> list[str]:
    """Everything that is wrong with the services, one line each."""
    built = {service["image"] for service in compose.services.values() if "build" in service}
    return [
        f"{name}: {problem}"
        for name, service in compose.services.items()
        for problem in (
            *_image_problems(compose, service, built),
            *_user_problems(service),
            *_volume_problems(compose, service),
            *_dependency_problems(compose, service),
            *_command_problems(service),
        )
    ]


def _image_problems(compose: Compose, service: Mapping[str, Any], built: set[str]) -> Iterator[str]:
    if service["image"] not in built:
        yield f"no service builds its image {service['image']}"
    if "build" in service:
        context = (compose.folder / service["build"]["context"]).resolve()
        if not (context / service["build"]["dockerfile"]).is_file():
            yield f"there is no {service['build']['dockerfile']} in {context}"
    elif service.get("pull_policy") != "never":
        yield "an image that another service builds must not be pulled"


def _user_problems(service: Mapping[str, Any]) -> Iterator[str]:
    if str(service.get("user", "emkd")).split(":")[0] in {"root", "0"} or service.get("privileged"):
        yield "runs as root"


def _volume_problems(compose: Compose, service: Mapping[str, Any]) -> Iterator[str]:
    for mount in service.get("volumes", ()):
        source = mount.split(":")[0]
        if source not in compose.volumes:
            yield f"volume {source} is not declared"


def _dependency_problems(compose: Compose, service: Mapping[str, Any]) -> Iterator[str]:
    for target, wanted in service.get("depends_on", {}).items():
        if target not in compose.services:
            yield f"depends on {target}, which is no service"
        elif wanted["condition"] not in CONDITIONS:
            yield f"{wanted['condition']} is no condition"
        elif wanted["condition"] == "service_healthy" and "healthcheck" not in compose.services[target]:
            yield f"waits for the health of {target}, which has no health check"
        elif "profiles" in compose.services[target]:
            yield f"depends on {target}, which is in a profile of its own"


def _command_problems(service: Mapping[str, Any]) -> Iterator[str]:
    for line in commands(service):
        try:
            parse_command(shlex.split(line))
        except CommandError as error:
            yield f"{line!r}: {error}"


def commands(service: Mapping[str, Any]) -> list[str]:
    """Command lines without redirections, in the order in which the service runs them."""
    found = [line for script in (start_script(service), health_script(service)) for line in script.splitlines()]
    parts = [part.strip() for line in found for part in line.split("|")]
    for redirection in REDIRECTIONS:
        parts = [part.removesuffix(redirection).strip() for part in parts]
    return [part.removeprefix("exec ") for part in parts if part]


def start_script(service: Mapping[str, Any]) -> str:
    """What the service runs, as text for `sh -euc`."""
    entrypoint, command = service["entrypoint"], service["command"]
    if entrypoint == ["sh", "-euc"]:
        return str(command[0])
    return shlex.join([*entrypoint, *command])


def health_script(service: Mapping[str, Any]) -> str:
    """The same of the health check; empty where there is none."""
    kind, *words = service.get("healthcheck", {}).get("test", ["NONE"])
    return {"CMD": shlex.join(words), "CMD-SHELL": " ".join(words), "NONE": ""}[kind]


def parse_command(words: list[str]) -> None:
    """Parses with the program's own parser. Raises CommandError."""
    program, *arguments = words
    command: Any
    if program == "grep":
        return
    if program == "ray":
        from ray.scripts.scripts import cli

        command = cli
    elif program == "emkd":
        import typer

        from emkd.cli import app

        command = typer.main.get_command(app)
    else:
        raise CommandError(f"{program} is not known to these checks")
    inner = command.commands.get(arguments[0]) if arguments else None
    if inner is None:
        raise CommandError(f"{program} has no command {arguments[:1]}")
    try:
        inner.make_context(inner.name, arguments[1:]).close()
    except Exception as error:
        # Ray's click and the one inside typer have no class of errors in common, but this.
        if not hasattr(error, "format_message"):
            raise
        raise CommandError(error.format_message()) from error
