"""docker/compose.yaml as Docker sees it, and the command lines in it."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def compose(**env: str) -> dict[str, Any]:
    """The file with ${NAME:-default} filled in."""
    text = (ROOT / "docker" / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: env.get(found[1], found[2]), text))


def start_script(service: dict[str, Any]) -> str:
    """What a service runs, as text for `sh -euc`."""
    if service["entrypoint"] == ["sh", "-euc"]:
        return service["command"][0]
    return shlex.join([*service["entrypoint"], *service["command"]])


def health_script(service: dict[str, Any]) -> str:
    kind, *words = service.get("healthcheck", {}).get("test", ["CMD"])
    return words[0] if kind == "CMD-SHELL" else shlex.join(words)


def command_lines(service: dict[str, Any]) -> list[list[str]]:
    """The words of every program that a service starts, health check included."""
    lines = [*start_script(service).splitlines(), *health_script(service).splitlines()]
    parts = [part.split(">")[0].strip().removeprefix("exec ") for line in lines for part in line.split("|")]
    return [shlex.split(part) for part in parts if part]


def parse(words: list[str]) -> None:
    """Parse a command line with the program's own parser. Raises an error with `format_message` if it refuses."""
    import typer
    from ray.scripts.scripts import cli

    from emkd.cli import app

    program, *arguments = words
    command = {"ray": cli, "emkd": typer.main.get_command(app)}[program]
    command.commands[arguments[0]].make_context(arguments[0], arguments[1:]).close()
