"""An extension of griffe: the `name: meaning` lines of this project's docstrings become lists.

    files:   what is read         - **`files`**: what is read
    window:  decoded shards       - **`window`**: decoded shards
             that are kept            that are kept

Docstrings are read in the source, where aligned lines read best; Markdown would run them together into a paragraph.
Only names of the function's parameters or of the class's attributes make such a line, so that prose with a colon stays
as it is.
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*):\s+(?P<meaning>\S.*)")


class Lists(griffe.Extension):
    """Rewrite the docstring of each function and class when it has been loaded."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = with_lists(func.docstring.value, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            cls.docstring.value = with_lists(cls.docstring.value, set(cls.members))


def with_lists(docstring: str, names: set[str]) -> str:
    """The docstring with its `name: meaning` lines as a list, of these names alone."""
    lines: list[str] = []
    within = False
    for line in docstring.splitlines():
        entry = ENTRY.fullmatch(line)
        if entry and set(entry["names"].split(", ")) <= names:
            if not within and lines and lines[-1]:
                lines.append("")
            named = ", ".join(f"`{name}`" for name in entry["names"].split(", "))
            lines.append(f"- **{named}**: {entry['meaning']}")
            within = True
        elif within and line.startswith("    "):
            lines.append(f"    {line.strip()}")
        else:
            if within and line:
                lines.append("")
            within = False
            lines.append(line)
    return "\n".join(lines)
