"""Reads a Dockerfile and its .dockerignore, as far as ours use them; what is not known is refused.

parse(text)                     -> [Step("RUN", "pip install .", line=12), ...]
Ignore(text).ignored("a/b.py")  -> the rule of Docker: the last pattern that fits decides
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

KNOWN = {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}


class StepError(ValueError):
    """A step that failed, or that these checks do not know and so cannot vouch for."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction: continuation lines joined, comments gone."""

    name: str
    text: str
    line: int

    def words(self) -> list[str]:
        return shlex.split(self.text)

    def json_list(self) -> list[str]:
        """The exec form of ENTRYPOINT and CMD. Raises StepError for the shell form."""
        try:
            words = json.loads(self.text)
        except json.JSONDecodeError as error:
            raise StepError(f"line {self.line}: {self.name} is not a JSON list: {self.text}") from error
        return [str(word) for word in words]


def parse(text: str) -> list[Step]:
    """The steps in order. Raises StepError for instructions, flags and here-documents."""
    steps: list[Step] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not pending:
            start = number
        if line.endswith("\\"):
            pending += line[:-1].rstrip() + " "
            continue
        steps.append(_step(pending + line, start))
        pending = ""
    if pending:
        raise StepError(f"line {start}: ends in a continuation")
    return steps


def _step(text: str, line: int) -> Step:
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name not in KNOWN:
        raise StepError(f"line {line}: {name} is not known to these checks")
    if "<<" in rest or (name in {"RUN", "COPY", "FROM"} and rest.startswith("--")):
        raise StepError(f"line {line}: flags and here-documents are not known to these checks: {text}")
    return Step(name=name, text=rest, line=line)


def only(steps: list[Step], name: str) -> Step:
    """The last step of a name: the one that counts for USER, ENTRYPOINT and CMD."""
    found = [step for step in steps if step.name == name]
    if not found:
        raise StepError(f"the Dockerfile has no {name}")
    return found[-1]


def environment(steps: list[Step]) -> dict[str, str]:
    """What all ENV steps set, in the form NAME=value."""
    pairs = [word.partition("=") for step in steps if step.name == "ENV" for word in step.words()]
    return {name: value for name, _, value in pairs}


class Ignore:
    """A .dockerignore file. Patterns start at the context's root; one that fits a folder fits all in it."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._rules = [
            (_regex(line.removeprefix("!").strip().strip("/")), line.startswith("!"))
            for line in lines
            if line and not line.startswith("#")
        ]

    def ignored(self, path: str) -> bool:
        parts = path.split("/")
        paths = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        result = False
        for regex, keeps in self._rules:
            if any(regex.fullmatch(candidate) for candidate in paths):
                result = not keeps
        return result


def _regex(pattern: str) -> re.Pattern[str]:
    if set(pattern) & set("[]\\"):
        raise StepError(f".dockerignore: {pattern!r} is not known to these checks")
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(known.get(piece, re.escape(piece)) for piece in pieces))


def copied_files(context: Path, source: str, ignore: Ignore) -> list[Path]:
    """Files that `COPY source` would find, relative to the context. Raises FileNotFoundError for none."""
    root = context / source
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    relative = [path.relative_to(context) for path in files]
    found = [path for path in relative if not ignore.ignored(path.as_posix())]
    if not found:
        raise FileNotFoundError(f"COPY {source}: nothing in the build context, or all of it in .dockerignore")
    return found
