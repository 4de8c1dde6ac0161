"""The settings of `cache-teacher --dry-run` on a terminal, without torch."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emkd.units import size_text

WIDTH = 118  # no table here is wider
FIGURES = (
    ("regret", "{:.3f}"),
    ("vsd_error", "{:+.0%}"),
    ("rld_error", "{:+.0%}"),
    ("hidden_cosine", "{:.3f}"),
    ("joint_cosine", "{:.3f}"),
)
HEADS = ("regret", "VSD\nerror", "RLD\nerror", "gradient\ncosine", "joint\ncosine")


def render_choices(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what `emkd.inspection.fidelity.choices` found."""
    console = console or Console(highlight=False, emoji=False, soft_wrap=True)
    if "missing" in found:
        console.print(f"settings are not compared: {escape(found['missing'])}", soft_wrap=True)
        return
    # A number that is cut off reads as another number: print past the edge of a narrow terminal.
    width, console.width = console.width, max(console.width, WIDTH)
    for distance in ("near", "far"):
        console.print(_table(found["settings"], distance))
        console.print()
    console.width = width
    for each in found["settings"]:
        if "missing" in each:
            console.print(escape(f"{each['name']}: {each['missing']}"), soft_wrap=True)
    console.print(
        f"Measured on {found['images']} of your images, with synthetic students: this teacher's states with noise, a "
        "quarter of its vision tokens. Errors are those of the losses; cosines are those of VSD's gradient with the "
        "exact one, with the best pairs and (joint) with the pairs found. Regret: 0 for the best pairs, 1 for random "
        "ones. Pairs are found by the paper's cost (losses.cost: logits).",
        soft_wrap=True,
    )
    console.print(escape(found["advice"]), soft_wrap=True)


def _table(settings: list[dict[str, Any]], distance: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"{distance} student\nsetting", no_wrap=True)
    for head in ("bytes a vision\ntoken: logits", "\ncodes", "\nboth", "whole\njob", "logit\nerror", *HEADS):
        table.add_column(head, justify="right", no_wrap=True)
    for each in settings:
        if "missing" in each:
            table.add_row(each["name"], "not possible")
            continue
        sizes = [f"{each['bytes'][part]:.0f}" for part in ("logits", "codes", "total")]
        figures = [_text(each[distance][name], form) for name, form in FIGURES]
        table.add_row(each["name"], *sizes, size_text(each["job_bytes"]), f"{each['logit_error']:.2f}", *figures)
    return table


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
