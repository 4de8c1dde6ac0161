"""Samples listed in pages, and found by what the list shows."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from emkd.cli import main
from emkd.errors import DamagedCacheError, SampleNotFoundError, UsageError
from emkd.inspection import inspect_cache, render
from emkd.inspection.report.listing import PAGE
from emkd.storage.cache import Cache
from emkd.storage.record import CapturedRow, RowHint
from tests.inspection.made import TOKENIZER, one_sample, span, write_cache
from tests.storage.builders import make_manifest, make_record

N = 2 * PAGE + 3


def made(path, ids):
    manifest = make_manifest(n_rows=len(ids), rows_per_shard=8, top_k=4, answer_top_k=4)
    rng = np.random.default_rng(0)
    rows = [
        CapturedRow(hint=RowHint(row=n, id=name), key=record.key, record=record)
        for n, name in enumerate(ids)
        for record in [make_record(rng, manifest, key=f"{n:064x}"[::-1])]
    ]
    shards = [[rows[row] for row in manifest.rows(shard)] for shard in manifest.shards]
    write_cache(path, manifest, shards)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """N samples; sample 1 has the id 5, sample 2 its own number, sample 3 a huge id."""
    ids = [f"row-{n}" for n in range(N)]
    ids[1:4] = ["5", "2", "9" * 30]
    return made(tmp_path_factory.mktemp("listed") / "cache", ids)


def test_the_pages_are_all_samples_in_order(cache):
    opened, tokenizer = Cache.open(cache), Tokenizer.from_buffer(TOKENIZER)
    pages = [inspect_cache(cache, page=page) for page in (1, 2, 3)]
    assert [len(page["list"]) for page in pages] == [PAGE, PAGE, 3]
    assert {page["pages"] for page in pages} == {3}
    for number, entry in enumerate(entry for page in pages for entry in page["list"]):
        record = opened.record(number)
        assert (entry["number"], entry["key"]) == (number, opened.sample_keys[number])
        assert entry["tokens"] == {
            "text": len(record.text_ids), "vision": len(record.vision), "answer": len(record.answer)
        }  # fmt: skip
        assert entry["images"] == len(record.images)
        first = tokenizer.decode([int(record.text_ids[0])], skip_special_tokens=False).strip()
        assert first in entry["text"]
    for page in (-1, 4):
        with pytest.raises(SampleNotFoundError, match="fill pages 1 to 3"):
            inspect_cache(cache, page=page)


def test_on_a_terminal_each_sample_is_a_line(cache, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", str(cache), "--list", "--page", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [str(n) for n in range(N - 3, N)]
    assert [line.split()[1] for line in lines[1:4]] == [f"row-{n}" for n in range(N - 3, N)]
    assert max(map(len, lines)) <= 80
    assert f"page 3 of 3, {N} samples." in lines[-1]
    with pytest.raises(SystemExit):
        main(["inspect", str(cache), "--list", "--json"])
    assert json.loads(capsys.readouterr().out) == inspect_cache(cache, page=1)


def test_a_number_is_accepted(cache, capsys):
    keys = Cache.open(cache).sample_keys
    assert inspect_cache(cache, sample=0)["key"] == inspect_cache(cache, sample="0")["key"] == keys[0]
    assert inspect_cache(cache, sample=str(N - 1))["key"] == keys[-1]
    assert inspect_cache(cache, sample="2")["key"] == keys[2], "its id is its number"
    assert inspect_cache(cache, sample="9" * 30)["key"] == keys[3], "an id, too large for a number"
    with pytest.raises(UsageError, match=re.escape(f"5 is the number of sample {keys[5]}") + f".*of sample {keys[1]}"):
        inspect_cache(cache, sample="5")
    with pytest.raises(SampleNotFoundError, match=f"'{N}'"):
        inspect_cache(cache, sample=N)
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(cache), "--sample", "0"])
    assert not left.value.code
    assert keys[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--page", "2"], "--page works only with --list"),
        (["--list", "--sample", "0"], "leave out one of the two"),
        (["--list", "--page", "4"], "no page 4, the samples fill pages 1 to 3"),
    ],
)
def test_wrong_calls(cache, arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(cache), *arguments])
    assert left.value.code
    assert message in capsys.readouterr().err


def test_a_list_of_nothing(tmp_path):
    report = inspect_cache(made(tmp_path / "one", ["a"]), page=1)
    assert (report["samples"], report["pages"], len(report["list"])) == (1, 1, 1)


def test_text_of_a_stranger_is_shown_without_what_controls_a_terminal(tmp_path):
    one_sample(tmp_path / "c", [span(0, 4, ((2, 2),))], row_id="\u202ea\x1b[2J")
    console = Console(file=io.StringIO(), width=80, highlight=False)
    render(inspect_cache(tmp_path / "c", page=1), console)
    shown = console.file.getvalue()
    assert "·a·[2J" in shown
    assert not {"\x1b", "\u202e"} & set(shown)


def test_a_damaged_shard_is_an_error(tmp_path):
    path = made(tmp_path / "c", ["a", "b"])
    next(path.glob("shards/*/text_ids/c/0")).write_bytes(b"x")
    with pytest.raises(DamagedCacheError, match="text_ids"):
        inspect_cache(path, page=1)
