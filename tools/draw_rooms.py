"""Draw docs/rooms.svg: which package of emkd imports which, read from the imports themselves.

    python -m tools.draw_rooms [--check]

Each `layers` contract of import-linter in pyproject.toml becomes a panel. A panel lists its rooms in the order of the
contract, so that every import points down: a dot on a room's line says that the room imports the room at the end of
that vertical. Bars grow with the lines of code, which are rounded, so that the picture changes when the structure does
and not with every edit. `--check` writes nothing and exits with 1 if the picture is not up to date.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"

ROW, TITLE, MARGIN = 30, 52, 24
LABEL, BAR, LANE = 104, 150, 22
LONGEST = BAR - 46  # bar of a panel's largest room

LEGEND = (
    "Rows are rooms; a room imports only rooms below it. A dot: the",
    "room of this row imports the room that the vertical points to.",
    "Rows on one shade are one layer and do not import each other.",
    "Bars: lines of code, rounded.",
)
LEGEND_WIDTH, LEGEND_HEIGHT = 350, 18 * len(LEGEND)

STYLE = """
  text { font: 13px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2933 }
  .title { font-weight: 600; font-size: 15px }
  .soft { fill: #6b7785; font-size: 11px }
  .paper { fill: #ffffff }
  .band { fill: #f1f4f8 }
  .bar { fill: #3f6fb5 }
  .line { stroke: #c3ccd6; fill: none }
  .lane { stroke: #6b7785; fill: none; stroke-width: 1.5 }
  .head { fill: #6b7785 }
  .dot { fill: #c2571a }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6eaef }
    .soft, .head { fill: #98a4b1 }
    .paper { fill: #171b21 }
    .band { fill: #20262e }
    .bar { fill: #5b8fd9 }
    .line { stroke: #46515d }
    .lane { stroke: #98a4b1 }
    .dot { fill: #f09a5a }
  }
"""


@dataclass(frozen=True, kw_only=True)
class Room:
    """A package or module of a panel. layer: its row in the contract;  imports: names of other rooms"""

    name: str
    layer: int
    lines: int
    imports: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One contract: its package, its name and its rooms from top to bottom."""

    package: str
    title: str
    rooms: tuple[Room, ...]

    @property
    def targets(self) -> list[str]:
        """Rooms that others import, from top to bottom: each has a vertical, the lowest on the right."""
        imported = {name for room in self.rooms for name in room.imports}
        return [room.name for room in self.rooms if room.name in imported]

    @property
    def width(self) -> int:
        return LABEL + BAR + LANE * (len(self.targets) + 1)

    @property
    def height(self) -> int:
        return TITLE + ROW * len(self.rooms)


def layers_contracts(pyproject: Path) -> Iterator[tuple[str, str, list[list[str]]]]:
    """(package, name, layers) of each `layers` contract, each layer a list of names below the package."""
    linter = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]
    for contract in linter["contracts"]:
        if contract["type"] != "layers":
            continue
        for package in contract.get("containers", [linter["root_package"]]):
            layers = [
                [name.strip("() ").removeprefix(f"{package}.") for name in layer.split("|")]
                for layer in contract["layers"]
            ]
            yield package, contract["name"], layers


def rooms_of(graph: grimp.ImportGraph, package: str, layers: list[list[str]], folder: Path) -> Iterator[Room]:
    """The rooms of a contract, with what each imports of the others. folder: holds the root package"""
    names = [name for layer in layers for name in layer]
    home = {}
    for name in names:
        module = f"{package}.{name}"
        home[module] = name
        home.update(dict.fromkeys(graph.find_descendants(module), name))
    for layer, row in enumerate(layers):
        for name in row:
            own = [module for module, room in home.items() if room == name]
            imported = {home.get(found) for module in own for found in graph.find_modules_directly_imported_by(module)}
            others = frozenset(room for room in imported if room is not None and room != name)
            yield Room(
                name=name, layer=layer, lines=n_lines(folder.joinpath(*package.split("."), name)), imports=others
            )


def n_lines(path: Path) -> int:
    """Lines of a package's or module's files, rounded: to 100 below 1,000, to 500 above."""
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    exact = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    step = 100 if exact < 1000 else 500
    return max(100, round(exact / step) * step)


def panels(root: Path) -> list[Panel]:
    """One for each contract of root/pyproject.toml, of the package below root."""
    contracts = list(layers_contracts(root / "pyproject.toml"))
    graph = grimp.build_graph(contracts[0][0].split(".")[0], cache_dir=None)
    return [
        Panel(package=package, title=title, rooms=tuple(rooms_of(graph, package, layers, root)))
        for package, title, layers in contracts
    ]


def draw(found: list[Panel]) -> str:
    """The first panel at the top left, the others where there is room: see `placed`."""
    places = placed(found)
    ends = [(left + panel.width, top + panel.height) for panel, left, top in places]
    legend = 2 * MARGIN + found[0].width
    width = max(legend + LEGEND_WIDTH, *(right for right, _ in ends)) + MARGIN
    height = max(MARGIN + LEGEND_HEIGHT, *(bottom for _, bottom in ends)) + MARGIN
    parts = [f'<rect class="paper" width="{width}" height="{height}" rx="8"/>']
    for i, line in enumerate(LEGEND):
        parts.append(f'<text class="soft" x="{legend}" y="{MARGIN + 14 + 18 * i}">{line}</text>')
    for panel, left, top in places:
        parts += _panel(panel, left, top)
    described = "; ".join(
        f"{panel.package}.{room.name} imports {', '.join(sorted(room.imports))}"
        for panel in found
        for room in panel.rooms
        if room.imports
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" aria-labelledby="title desc">',
            '<title id="title">The packages of emkd, and which imports which</title>',
            f'<desc id="desc">{escape(described)}</desc>',
            f"<style>{STYLE}</style>",
            *parts,
            "</svg>",
            "",
        ]
    )


def placed(found: list[Panel]) -> list[tuple[Panel, int, int]]:
    """(panel, left, top): small panels below the legend as long as they are not lower than the first panel, the others
    side by side below that."""
    first, *rest = found
    places = [(first, MARGIN, MARGIN)]
    below = first.height + 2 * MARGIN
    top, left = LEGEND_HEIGHT + 2 * MARGIN, MARGIN
    for panel in sorted(rest, key=lambda panel: panel.height):
        if top + panel.height <= MARGIN + first.height:
            places.append((panel, first.width + 2 * MARGIN, top))
            top += panel.height + MARGIN
    aside = [panel for panel, _, _ in places]
    for panel in rest:
        if panel not in aside:
            places.append((panel, left, below))
            left += panel.width + MARGIN
    return places


def _panel(panel: Panel, left: int, top: int) -> Iterable[str]:
    yield f'<g transform="translate({left} {top})">'
    yield f'<text class="title" y="14">{escape(panel.package)}</text>'
    yield f'<text class="soft" y="32">{escape(panel.title)}</text>'
    yield from _bands(panel)
    start = LABEL + BAR
    middle = {room.name: TITLE + ROW * row + ROW // 2 for row, room in enumerate(panel.rooms)}
    lane = {name: start + LANE * (i + 1) for i, name in enumerate(panel.targets)}
    for room in panel.rooms:
        if room.imports:
            end = max(lane[name] for name in room.imports)
            yield f'<path class="line" d="M{start} {middle[room.name] + 5}H{end}"/>'
    for name in panel.targets:
        highest = min(middle[room.name] for room in panel.rooms if name in room.imports)
        y = middle[name] - 5
        yield f'<path class="lane" d="M{lane[name]} {highest + 5}V{y - 6}q0 6 -6 6H{start + 6}"/>'
        yield f'<path class="head" d="M{start} {y}l8 -4v8z"/>'
    for room in panel.rooms:
        for name in panel.targets:
            if name in room.imports:
                yield f'<circle class="dot" cx="{lane[name]}" cy="{middle[room.name] + 5}" r="4"/>'
    for room in panel.rooms:
        y, long = middle[room.name], max(3, round(LONGEST * room.lines / max(other.lines for other in panel.rooms)))
        yield f'<text x="{LABEL - 10}" y="{y + 4}" text-anchor="end">{escape(room.name)}</text>'
        yield f'<rect class="bar" x="{LABEL}" y="{y - 8}" width="{long}" height="16" rx="3"/>'
        yield f'<text class="soft" x="{LABEL + long + 5}" y="{y + 4}">{room.lines:,}</text>'
    yield "</g>"


def _bands(panel: Panel) -> Iterable[str]:
    """A background for every second layer."""
    for layer in sorted({room.layer for room in panel.rooms})[::2]:
        rows = [row for row, room in enumerate(panel.rooms) if room.layer == layer]
        y, height = TITLE + ROW * rows[0], ROW * len(rows)
        yield f'<rect class="band" x="0" y="{y}" width="{panel.width}" height="{height}" rx="4"/>'


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the picture is out of date")
    check = parser.parse_args(words).check
    picture = draw(panels(ROOT))
    if check:
        if PICTURE.read_text(encoding="utf-8") == picture:
            return 0
        print("docs/rooms.svg is not what the imports say now; run `make rooms`", file=sys.stderr)
        return 1
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
