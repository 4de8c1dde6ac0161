"""docs/architecture.md: the files it names exist, and the code it shows is the code."""

import re

from tests.figures import ROOT, page

PAGE = page("docs/architecture.md")


def test_named_files_and_folders_exist():
    names = re.findall(r"`((?:emkd|tests|benchmarks)/[a-z_/.]*)`", PAGE)
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists(), name


def test_named_objects_exist():
    code = "\n".join(file.read_text() for file in (ROOT / "emkd").rglob("*.py"))
    for name in ("RecordArrays", "TruncatedLogits", "TopLogits", "Record", "ArrayKind"):
        assert f"class {name}" in code


def test_the_entry_shown_is_there():
    entry = re.search(r"`(tail_logsumexp=[^`]+)`", PAGE)[1]
    assert entry in (ROOT / "emkd/storage/arrays/record_arrays.py").read_text()


def test_the_code_shown_is_the_code():
    """Line by line and in this order; docstrings are left out."""
    sources = [
        ROOT / "emkd/storage/arrays/tails.py",
        ROOT / "tests/storage/arrays/test_plain_kinds.py",
    ]
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == len(sources)
    for block, source in zip(blocks, sources, strict=True):
        lines = iter(source.read_text().splitlines())
        for line in block.splitlines():
            assert line in lines, f"{source.name}: {line!r} is not there, or not in this place"
