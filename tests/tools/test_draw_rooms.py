"""The picture of the rooms: it is up to date, and it says what the imports say."""

import sys
import xml.etree.ElementTree as ET

import grimp
import pytest

from tests.figures import ROOT, page
from tools.draw_rooms import PICTURE, Panel, Room, draw, layers_contracts, main, n_lines, panels, placed

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def found():
    return panels(ROOT)


def test_the_picture_is_what_the_imports_say_now(found):
    assert PICTURE.read_text() == draw(found), "run `make rooms`"
    assert main(["--check"]) == 0


def test_each_room_of_the_contracts_is_drawn_and_described(found):
    layered = ["emkd", "emkd.storage", "emkd.trainer", "emkd.inspection", "emkd.agreement"]
    assert [panel.package for panel in found] == layered
    names = {f"{panel.package}.{room.name}" for panel in found for room in panel.rooms}
    packages = {f"emkd.{folder.name}" for folder in (ROOT / "emkd").iterdir() if (folder / "__init__.py").is_file()}
    assert packages <= names
    for package in packages:
        assert f"`{package.removeprefix('emkd.')}`" in page("docs/architecture.md"), package


def test_every_import_is_a_dot_and_points_down(found):
    root = ET.fromstring(draw(found))
    assert len(root.findall(f".//{SVG}circle")) == sum(len(room.imports) for panel in found for room in panel.rooms)
    for panel in found:
        layer = {room.name: room.layer for room in panel.rooms}
        for room in panel.rooms:
            assert all(layer[name] > room.layer for name in room.imports)


def test_no_panel_covers_another(found):
    boxes = [(left, top, left + panel.width, top + panel.height) for panel, left, top in placed(found)]
    assert len(boxes) == len(found)
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top


def test_a_known_tree(tmp_path, monkeypatch):
    """top imports low through a submodule; side, in the same layer, imports nothing."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_package = "house"\n[[tool.importlinter.contracts]]\nname = "n"\ntype = "layers"\n'
        'layers = ["house.top | house.side", "house.low"]\n'
        '[[tool.importlinter.contracts]]\nname = "other"\ntype = "forbidden"\n'
    )
    house = tmp_path / "house"
    (house / "top").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "top/__init__": "",
        "top/a": "from house.low import x\n",
        "side": "",
        "low": "x = 1\n",
    }.items():
        (house / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(layers_contracts(tmp_path / "pyproject.toml")) == [("house", "n", [["top", "side"], ["low"]])]
    try:
        (panel,) = panels(tmp_path)
    finally:
        sys.modules.pop("house", None)
    top, side, low = panel.rooms
    assert (top.name, top.layer, top.imports) == ("top", 0, frozenset({"low"}))
    assert (side.layer, side.imports) == (0, frozenset())
    assert (low.layer, low.imports) == (1, frozenset())
    assert panel.targets == ["low"]


def test_lines_are_rounded(tmp_path):
    for n, rounded in ((3, 100), (149, 100), (951, 1000), (1249, 1000), (1251, 1500)):
        (tmp_path / "room.py").write_text("x = 1\n" * n)
        assert n_lines(tmp_path / "room") == rounded


def test_the_same_rooms_give_the_same_picture():
    rooms = [
        Room(name="a", layer=0, lines=100, imports=frozenset({"b", "c"})),
        Room(name="b", layer=1, lines=200, imports=frozenset()),
        Room(name="c", layer=2, lines=300, imports=frozenset()),
    ]
    one = Panel(package="p", title="t", rooms=tuple(rooms))
    other = Panel(
        package="p", title="t", rooms=(Room(name="a", layer=0, lines=100, imports=frozenset({"c", "b"})), *rooms[1:])
    )
    assert draw([one]) == draw([other])


def test_grimp_sees_all_modules():
    """Namespace packages would be left out of the graph: every folder with code has an __init__.py."""
    modules = grimp.build_graph("emkd", cache_dir=None).modules
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / "emkd").rglob("*.py")}
    assert {name.removesuffix(".__init__") for name in files} == modules
