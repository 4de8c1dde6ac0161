"""tools/measure.py on a small tree whose numbers were counted by hand."""

import json

import pytest

from tools.measure import Lengths, main, measure

ONE = '''"""Module."""

from typing import TYPE_CHECKING

from tree.two import b  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from tree.three import c

TEXT = "type: ignore"


@property
def a(x: "NDArray[int]") -> int:
    """Of x, [n].

    Raises ValueError.
    """
    if x is None:
        raise ValueError

    def nested():
        return 1

    return nested()


class Public:
    """Has methods."""

    def documented(self, x: "torch.Tensor"):
        """Names neither its dimensions nor its errors."""
        raise KeyError(x)

    def undocumented(self) -> None: ...

    def _private(self) -> None: ...


class _Hidden:
    def not_public(self) -> None: ...
'''
TWO = '''def b() -> None:
    """Only passes an error on."""
    from tree.one import a

    try:
        a(None)
    except ValueError:
        raise
'''
THREE = '"""Imports one, which imports it for types only."""\n\nfrom tree.one import a\n\nc = a\n'


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tree" / "empty").mkdir(parents=True)
    texts = {"__init__": "", "one": ONE, "two": TWO, "three": THREE, "empty/__init__": ""}
    for name, text in texts.items():
        (tmp_path / "tree" / f"{name}.py").write_text(text)
    return tmp_path / "tree"


def test_each_number_is_the_one_counted_by_hand(tree):
    found = measure(tree)
    assert found.files == Lengths(
        count=5, median=5, p90=41, longest=[("tree/one.py", 41), ("tree/two.py", 8), ("tree/three.py", 5)]
    )
    # a has 12 lines, 4 of them its docstring; nested 2, b 8 - 1, documented 3 - 1, and three of one line
    assert found.functions == Lengths(
        count=7,
        median=2,
        p90=8,
        longest=[("tree/one.py:a", 8), ("tree/two.py:b", 7), ("tree/one.py:Public.documented", 2)],
    )
    assert found.circles == [["tree.one", "tree.two"]]
    assert found.type_ignores == pytest.approx(1000 / 54)
    assert found.annotated == 5 / 7  # all but nested and documented
    assert found.docstrings == 4 / 5  # a, Public, documented, b; not undocumented
    assert found.errors_named == 1 / 2  # a does, documented does not; b raises nothing itself
    assert found.shapes_named == 1 / 2  # a does, documented does not


def test_a_folder_without_code_or_that_is_no_package(tmp_path):
    found = measure(tmp_path)
    assert (found.files.count, found.functions.longest, found.circles, found.annotated) == (0, [], None, None)
    (tmp_path / "script.py").write_text("x = 1\n")
    assert measure(tmp_path).type_ignores == 0


def test_a_part_of_a_package(tree):
    """Only import cycles of the folder's own modules count."""
    assert measure(tree / "empty").circles == []


def test_what_is_printed(tree, capsys):
    assert main([str(tree), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)[str(tree)]
    assert printed["functions"]["longest"][0] == ["tree/one.py:a", 8]
    assert printed["circles"] == [["tree.one", "tree.two"]]
    assert main([str(tree)]) == 0
    text = capsys.readouterr().out
    assert "tree.one <-> tree.two" in text
    assert "annotated returns        71%" in text
    with pytest.raises(SystemExit, match="2"):
        main([str(tree / "missing")])
    assert "not a folder" in capsys.readouterr().err
