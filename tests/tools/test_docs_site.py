"""The site: links that leave docs/, docstrings as lists, and the built pages."""

import os
import re
import subprocess
import sys
from importlib import import_module

import pytest

from tests.figures import ROOT
from tools.docs_site import PAGES, with_links


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("readme.md", "[jobs](docs/job.md)", "[jobs](job.md)"),
        ("readme.md", "[x](docs/benchmarks.md#reading)", "[x](benchmarks.md#reading)"),
        ("readme.md", "[recipe](emkd/recipes)", "recipe (`emkd/recipes`)"),
        ("training.md", "[demo.yaml](../emkd/recipes/demo.yaml)", "`emkd/recipes/demo.yaml`"),
        ("training.md", "[recipes/demo.yaml](../emkd/recipes/demo.yaml)", "`emkd/recipes/demo.yaml`"),
        ("index.md", "[a](../README.md) and [b](../docker/README.md)", "[a](readme.md) and [b](docker.md)"),
        ("docker.md", "[c](../SECURITY.md)", "[c](security.md)"),
        ("api/emkd.md", "[d](../job.md)", "[d](../job.md)"),
        ("job.md", "[e](https://example.org/x.md), [f](#more-rows), ![g](rooms.svg)", None),
    ],
)
def test_links_are_rewritten(page, link, expected):
    assert with_links(link, page) == (link if expected is None else expected)


def test_a_link_to_nothing_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"docs/job.md: a link leads to docs/missing.md, which is not there"):
        with_links("[x](missing.md)", "job.md")


def test_pages_from_outside_exist():
    for source in PAGES:
        assert (ROOT / source).is_file()


def test_entries_of_docstrings_become_lists():
    pytest.importorskip("griffe")
    from tools.docstrings import with_lists

    docstring = (
        "Open a cache.\n\npartial: open it\nwindow, size:  decoded shards\n         that are kept\n\nnote: prose stays"
    )
    assert with_lists(docstring, {"partial", "window", "size"}) == (
        "Open a cache.\n\n- **`partial`**: open it\n- **`window`, `size`**: decoded shards\n    that are kept\n\nnote: prose stays"
    )
    assert (
        with_lists("One line.\nname: what\nMore prose.", {"name"}) == "One line.\n\n- **`name`**: what\n\nMore prose."
    )


@pytest.mark.slow
def test_the_built_site(tmp_path):
    """Without warnings, with each public name, and without anything from another host."""
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    for name in ("emkd", "pipeline", "trainer", "storage", "inspection", "vlm"):
        package = "emkd" if name == "emkd" else f"emkd.{name}"
        text = (tmp_path / "api" / name / "index.html").read_text()
        shown = {anchor.split(".")[-1] for anchor in re.findall(r'<h[2-4] id="(emkd[^"]*)"', text)}
        public = set(import_module(package).__all__) - {"__version__"}
        assert public <= shown, package
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not loaded, page
