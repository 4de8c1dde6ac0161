"""One sample on a terminal: text, answers, and for each image its words and its affinity as heat maps.

A cell of a heat map is a shade, and on a colour terminal a colour as well; elsewhere rich drops the colours, so the
shades alone must be readable. Widths are in terminal cells: some characters take two.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.text import Text

from emkd.inspection.report.heatmap import bin_columns, bounds, levels
from emkd.text import printable

WORD_WIDTH, MIN_WORD_WIDTH = 9, 6
LABEL_WIDTH = 10
MARGIN = LABEL_WIDTH + 5  # of a heat map: the answers' mark, a space, the label, a space, two borders
MIN_COLUMNS = 8
SHADES = " ░▒▓█"
N_COLOURS = 16
_ANCHORS = ((68, 1, 84), (33, 145, 140), (253, 231, 37))  # the ends and the middle of viridis


def render_sample(report: dict[str, Any], console: Console) -> None:
    """Print a report of `describe_sample`."""
    mass = report["retained_mass"]
    _print(console, f"[bold]sample[/bold]  {report['key']}")
    _print(console, f"row {report['row']}, id {escape(printable(report['id'] or 'none'))}, shard {report['shard']}")
    tokens = ", ".join(f"{count:,} {name}" for name, count in report["tokens"].items())
    _print(console, f"tokens: {tokens}" + (f"; retained mass {mass:.4f}" if mass is not None else ""))
    lines = [printable(line.expandtabs()) for line in report["text"].split("\n")]
    _print(console, Text("\n".join(["", *lines, ""])))
    for answer in report["answers"]:
        same = "" if answer["said"] == answer["teacher"] else f"   (teacher: {answer['teacher']})"
        _print(console, Text(printable(f"  {answer['said']}{same}")))
    maps = [image["affinity"] for image in report["images"] if image["affinity"] is not None]
    for number, image in enumerate(report["images"]):
        _print(console, f"\n[bold]image {number}[/bold]  {image['height']} x {image['width']}, likeliest words:")
        _words(image["words"], console)
        if image["affinity"] is not None:
            _answer_grids(image["affinity"], bounds([t for m in maps for t in m["answer_grid"]]), console)
            _rows(image["affinity"], maps, report["tokens"]["text"], console)


def _print(console: Console, line: str | Text) -> None:
    console.print(line, soft_wrap=True, emoji=False)


def _words(tiles: list[list[list[str]]], console: Console) -> None:
    """Each tile's words; a grid too wide for the terminal continues below, in parts of about equally many columns."""
    for number, tile in enumerate(tiles):
        if len(tiles) > 1:
            _print(console, f"tile {number}:")
        n_columns = max(map(len, tile), default=0)
        fit, width = word_columns(n_columns, console.width)
        if len(tile) == 1:  # no grid: the words follow one another
            tile = [tile[0][at : at + fit] for at in range(0, n_columns, fit)]
            n_columns = min(n_columns, fit)
        for start in range(0, n_columns, fit):
            if n_columns > fit:
                _print(console, f"columns {start} to {min(start + fit, n_columns) - 1} of {n_columns}")
            for row in tile:
                line = " ".join(set_cell_size(printable(word), width) for word in row[start : start + fit])
                _print(console, Text(line.rstrip()))


def word_columns(n_columns: int, terminal: int) -> tuple[int, int]:
    """Return how many columns of a grid stand side by side, and how wide each is.

    Words are cut to MIN_WORD_WIDTH before the grid is split.
    """
    parts = -(-max(n_columns, 1) // max(1, (terminal + 1) // (MIN_WORD_WIDTH + 1)))
    side_by_side = -(-max(n_columns, 1) // parts)
    return side_by_side, max(1, min(WORD_WIDTH, (terminal + 1) // side_by_side - 1))


def _answer_grids(affinity: dict[str, Any], scale: tuple[float, float], console: Console) -> None:
    """The mean affinity of the answer at its position in the image, one scale for all images of the sample."""
    for number, tile in enumerate(affinity["answer_grid"]):
        name = f"tile {number}, " if len(affinity["answer_grid"]) > 1 else ""
        _print(console, f"\n{name}affinity {_scale(scale)}, mean of the answer tokens")
        fit = max(MIN_COLUMNS, console.width - 2)
        for line in _cells(bin_columns(tile, np.ones(len(tile[0])), fit)[0], scale, fit):
            _print(console, Text("│").append_text(line).append("│"))


def _rows(affinity: dict[str, Any], maps: Sequence[dict[str, Any]], n_text: int, console: Console) -> None:
    """Text tokens against vision tokens, one scale for all images of the sample."""
    fit = max(MIN_COLUMNS, console.width - MARGIN)
    scale = bounds([_binned(each, fit)[0] for each in maps])
    values, tokens_per_column = _binned(affinity, fit)
    column = "one vision token" if tokens_per_column == 1 else f"mean of {tokens_per_column} vision tokens"
    _print(console, f"\naffinity {_scale(scale)}, {column} a column")
    _print(console, f"{len(affinity['rows']):,} of {n_text:,} text tokens; answers are marked >")
    for row, line in zip(affinity["rows"], _cells(values, scale, fit), strict=True):
        mark = ">" if row["answer"] else " "
        _print(console, Text(f"{mark} {label(row['token'])} │").append_text(line).append("│"))


def _binned(affinity: dict[str, Any], fit: int) -> tuple[np.ndarray, int]:
    """The rows' values in at most `fit` columns, and how many vision tokens a column is the mean of."""
    each, n_columns, n_tokens = affinity["tokens_per_column"], affinity["n_columns"], affinity["n_tokens"]
    stands_for = [*([each] * (n_columns - 1)), n_tokens - each * (n_columns - 1)]
    values, counts = bin_columns([row["values"] for row in affinity["rows"]], stands_for, fit)
    return values, int(counts[0])


def _cells(values: ArrayLike, scale: tuple[float, float], width: int) -> list[Text]:
    """A line of shades for each row; cells are two wide if that fits, so that they are nearly square."""
    shades, colours = levels(values, *scale, len(SHADES)), levels(values, *scale, N_COLOURS)
    wide = 2 if 2 * shades.shape[1] <= width else 1
    return [
        Text.assemble(*((SHADES[s] * wide, colour(c)) for s, c in zip(*row, strict=True)))
        for row in zip(shades.tolist(), colours.tolist(), strict=True)
    ]


def _scale(scale: tuple[float, float]) -> str:
    return f"from {scale[0]:.2f} (blank) to {scale[1]:.2f} ({SHADES[-1]})"


def label(word: str) -> str:
    """Return a word right-aligned in LABEL_WIDTH terminal cells, cut if it is longer."""
    word = printable(word)
    cut = set_cell_size(word, min(cell_len(word), LABEL_WIDTH))
    return " " * (LABEL_WIDTH - cell_len(cut)) + cut


@lru_cache
def colour(level: int) -> Style:
    """Return the style of a level, dark to bright; the foreground is a little brighter, to be visible on it."""
    position = level / (N_COLOURS - 1) * (len(_ANCHORS) - 1)
    first = min(int(position), len(_ANCHORS) - 2)
    share = position - first
    low, high = _ANCHORS[first], _ANCHORS[first + 1]
    back = [round(a + (b - a) * share) for a, b in zip(low, high, strict=True)]
    front = [c + (255 - c) // 5 for c in back]
    return Style.parse(f"rgb({','.join(map(str, front))}) on rgb({','.join(map(str, back))})")
