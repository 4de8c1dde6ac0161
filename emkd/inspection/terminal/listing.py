"""A page of samples on a terminal: one line each."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emkd.text import printable

KEY_LENGTH = 12  # of the key's beginning: enough to name a sample with --sample
ID_WIDTH = 20


def render_list(report: dict[str, Any], console: Console) -> None:
    """Print a report of `list_samples`; long ids and texts are cut, --json prints more of them."""
    table = Table(box=None, pad_edge=False, expand=True)
    for name, right in (("number", True), ("id", False), ("key", False), ("text", True), ("vision", True)):
        limit = ID_WIDTH if name == "id" else None
        table.add_column(name, justify="right" if right else "left", no_wrap=True, max_width=limit)
    table.add_column("answer", justify="right", no_wrap=True)
    table.add_column("first words", no_wrap=True, overflow="ellipsis", ratio=1)
    for entry in report["list"]:
        tokens = (f"{entry['tokens'][kind]:,}" for kind in ("text", "vision", "answer"))
        words = printable(" ".join(entry["text"].split()))
        row = (str(entry["number"]), printable(entry["id"] or "-"), entry["key"][:KEY_LENGTH], *tokens, words)
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()
    more = f"; the next: --page {report['page'] + 1}" if report["page"] < report["pages"] else ""
    console.print(
        f"page {report['page']} of {report['pages']}, {report['samples']:,} samples{more}. One sample: --sample NUMBER",
        soft_wrap=True,
    )
