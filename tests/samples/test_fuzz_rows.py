"""Rows at random, in every format: a row is used as docs/data.md says, or skipped with a reason; never a traceback.

`read` below is written from docs/data.md alone, for the names and values that the strategies draw.
"""

import base64
import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emkd.errors import EmkdError, SampleError
from emkd.samples import Dataset
from emkd.samples.sample import ImagePart
from tests import tiny

FILES = {"a.png": tiny.png(1), "sub/b.png": tiny.png(2)}
TEXT = base64.b64encode(FILES["a.png"]).decode()
GOOD = {"a.png": "a.png", "sub/b.png": "sub/b.png", TEXT: "a.png", f"data:image/png;base64,{TEXT}": "a.png"}
BAD = [
    "gone.png",
    "../a.png",
    "https://x.org/a.png",
    "a.mp4",
    "data:audio/wav;base64,AA==",
    "data:image/png",
    "A" * 5000,
]

MEDIA = ("video", "audios", "imgs", "image_path", "Image", "pixel_values", "image_2")
REFUSED = {"row": ("system", "tools"), "turn": ("tool_calls", "reasoning_content"), "part": ("max_pixels", "fps")}
FLAGS = ("loss", "weight", "train")
HARMLESS = ("source", "score", "image_size", "detail", "\x1b[1m", "")
ABSENT = (None, "", [], [None], {"bytes": None, "path": None})


class Skipped(Exception):
    """The page says that the row cannot be used."""


def absent(value: Any) -> bool:
    return value in ABSENT and value is not False and value != 0


def refuse(condition: bool) -> None:
    if condition:
        raise Skipped


def read(row: dict[str, Any]) -> tuple[list[Any], list[bytes]]:
    """([(role, parts, learnt)], images), an image part as None. Raises Skipped."""
    listed = [row[name] for name in ("images", "image") if not absent(row.get(name))]
    listed = [value if isinstance(value, list) else [value] for value in listed]
    refuse(len(listed) == 2 and listed[0] != listed[1])
    check_names("row", row, {"id", "messages", "conversations", "images", "image"}, bool(listed))
    talks = [read_turns(row[name]) for name in ("messages", "conversations") if not absent(row.get(name))]
    refuse(not talks or any(talk != talks[0] for talk in talks))
    turns, places = talks[0]
    images = pictures(places, listed[0] if listed else [])
    return turns, images


def check_names(level: str, item: dict[str, Any], known: set[str], has_images: bool) -> None:
    for name, value in item.items():
        if name in known or absent(value):
            continue
        refuse(name in MEDIA and not isinstance(value, int | float))
        refuse(name in REFUSED[level] or (level != "turn" and name in FLAGS and value != 1))
        texts = value if isinstance(value, list) else [value.get("path")] if isinstance(value, dict) else [value]
        named = (isinstance(t, str) and t.startswith(("data:image/", "data:audio/")) for t in texts)
        ends = (isinstance(t, str) and len(t) < 999 and t.endswith((".png", ".mp4")) for t in texts)
        refuse(not has_images and (any(named) or any(ends)))


def read_turns(value: Any) -> tuple[list[Any], list[Any]]:
    refuse(not isinstance(value, list))
    turns, places = [], []
    for turn in value:
        refuse(not isinstance(turn, dict))
        check_names("turn", turn, {"role", "from", "content", "value", *FLAGS}, False)
        role, content = either(turn, "role", "from"), either(turn, "content", "value")
        role = {"human": "user", "gpt": "assistant"}.get(role, role) if isinstance(role, str) else role
        refuse(role not in ("user", "assistant", "system"))
        parts, found = read_content(content, role)
        refuse(role == "assistant" and bool(found))
        turns.append((role, parts, learnt(turn, role)))
        places += found
    return turns, places


def either(turn: dict[str, Any], first: str, second: str) -> Any:
    given = [turn[name] for name in (first, second) if turn.get(name) is not None]
    refuse(len(given) == 2 and given[0] != given[1])
    return given[0] if given else None


def learnt(turn: dict[str, Any], role: str) -> bool:
    flags = [turn[name] for name in FLAGS if not absent(turn.get(name))]
    refuse(any(not isinstance(flag, int | float) or flag not in (0, 1) for flag in flags))
    refuse(len({bool(flag) for flag in flags}) == 2)
    refuse(role != "assistant" and any(flags))
    return role != "assistant" or all(flags)


def read_content(content: Any, role: str) -> tuple[list[Any], list[Any]]:
    if isinstance(content, str):
        marks_of_others(content, role)
        parts: list[Any] = []
        for number, piece in enumerate(content.split("<image>")):
            parts += [None] if number else []
            piece = piece[1:] if number and piece.startswith("\n") else piece
            last = number == content.count("<image>")
            parts += [piece[:-1] if not last and piece.endswith("\n") else piece]
        return [part for part in parts if part != ""], [{}] * content.count("<image>")
    refuse(not isinstance(content, list))
    parts, places = [], []
    for part in content:
        refuse(not isinstance(part, dict))
        own = [name for name in ("image", "image_url", "url", "bytes", "path") if not absent(part.get(name))]
        check_names("part", part, {"type", "text", "index", "image", "image_url", "url", "bytes", "path"}, False)
        if part.get("type") == "text":
            refuse(bool(own) or part.get("index") is not None or not isinstance(part.get("text"), str))
            marks_of_others(part["text"], role)
            parts.append(part["text"])
            continue
        refuse(part.get("type") not in ("image", "image_url") or bool(part.get("text")))
        index = part.get("index")
        refuse(index is not None and (type(index) is not int or index < 0))
        refuse(len(own) > 1 or (bool(own) and index is not None))
        parts.append(None)
        places.append({"own": part[own[0]]} if own else {} if index is None else {"index": index})
    return parts, places


def marks_of_others(text: str, role: str) -> None:
    refuse(role != "assistant" and (text.startswith("<video>") or "<image_1>" in text))


def pictures(places: list[Any], listed: list[Any]) -> list[bytes]:
    kinds = {"own" if "own" in place else "index" if "index" in place else "next" for place in places}
    refuse(len(kinds) > 1)
    if kinds == {"own"}:
        refuse(bool(listed))
        return [data_of(place["own"]) for place in places]
    if kinds == {"index"}:
        refuse({place["index"] for place in places} != set(range(len(listed))))
        return [data_of(listed[place["index"]]) for place in places]
    refuse(len(places) != len(listed))
    return [data_of(entry) for entry in listed]


def data_of(entry: Any) -> bytes:
    if isinstance(entry, dict):
        entry = entry.get("bytes") or entry.get("path") or entry.get("url")
    refuse(not isinstance(entry, str) or entry not in GOOD)
    return FILES[GOOD[entry]]


# ---- rows


def objects(named: dict[str, st.SearchStrategy[Any]], level: str) -> st.SearchStrategy[Any]:
    """Some of the named keys, and often a stranger."""
    strangers = st.dictionaries(
        st.sampled_from((*MEDIA, *REFUSED[level], *(FLAGS if level != "turn" else ()), *HARMLESS)), junk, max_size=1
    )
    return st.tuples(st.fixed_dictionaries({}, optional=named), strangers).map(lambda two: {**two[1], **two[0]})


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any], share: int = 12) -> st.SearchStrategy[Any]:
    return st.integers(0, share).flatmap(lambda n: good if n else bad)


junk = st.sampled_from(
    [*ABSENT, 0, 1, 0.5, True, False, "x", "a.png", "a.mp4", ["a.png"], {"path": "a.mp4"}, [1, 2], "\ud800"]
)
entry = mostly(st.sampled_from([*GOOD, {"path": "a.png"}, {"bytes": None, "path": "sub/b.png"}, {"url": "a.png"}]), st.sampled_from([*BAD, 5, None]))  # fmt: skip
text = mostly(st.sampled_from(["what", "<image>", "<image>\nwhat", "a\n<image>\nb<image>", "x <video> y", ""]), st.sampled_from(["<video> what", "<image_1>", "\u202e\x1b[31m"]))  # fmt: skip
plain = st.sampled_from(["what", "cat", "<b>"])
part = mostly(
    st.one_of(
        st.fixed_dictionaries({"type": st.just("text"), "text": plain}, optional={"index": st.none()}),
        st.fixed_dictionaries({"type": st.just("image")}, optional={"text": st.none()}),
        st.fixed_dictionaries({"type": st.just("image"), "index": st.integers(0, 1)}),
        st.fixed_dictionaries({"type": st.just("image"), "image": entry}),
        st.fixed_dictionaries({"type": st.just("image_url"), "image_url": entry}),
    ),
    objects({"type": junk, "text": junk, "index": junk, "image": entry, "path": st.just("a.png")}, "part"),
)
indexed = st.permutations(
    [{"type": "image", "index": 0}, {"type": "image", "index": 1}, {"type": "text", "text": "what"}]
)
content = st.one_of(text, indexed, st.lists(part, max_size=3))
flag = mostly(st.sampled_from([0, 1, True, False, None]), junk)


def turns(role: str, said: str, names: tuple[str, str]) -> st.SearchStrategy[Any]:
    asked = st.fixed_dictionaries({role: st.just(names[0]), said: content})
    answered = st.fixed_dictionaries({role: st.just(names[1]), said: plain}, optional=dict.fromkeys(FLAGS, flag))
    odd = objects({"role": st.just("user"), "from": junk, "content": content, "value": junk, "loss": junk}, "turn")
    return st.lists(mostly(st.one_of(asked, answered), odd, 8), max_size=4)


messages = turns("role", "content", ("user", "assistant"))
clean = st.one_of(
    st.fixed_dictionaries({"messages": messages}),
    st.fixed_dictionaries({"conversations": turns("from", "value", ("human", "gpt"))}),
)
odd = objects({"messages": mostly(messages, junk), "conversations": mostly(messages, junk)}, "row")


shown = st.fixed_dictionaries(
    {
        "images": st.permutations(["a.png", "sub/b.png"]),
        "messages": indexed.map(lambda parts: [{"role": "user", "content": parts}, tiny.turn("assistant", "cat")]),
    }
)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly with as many pictures as are marked, and mostly without strangers."""
    if draw(st.integers(0, 5)) == 0:
        return {**draw(shown), **draw(mostly(st.just({}), objects({}, "row"), 2))}
    row = draw(mostly(clean, odd, 6))
    marks = json.dumps(row).count("<image>") + len(re.findall(r'"type": "image"(?!, "image)', json.dumps(row)))
    fitting = st.sampled_from(["images", "image"]).flatmap(
        lambda name: st.fixed_dictionaries({name: st.lists(entry, min_size=marks, max_size=marks)})
    )
    other = st.fixed_dictionaries({}, optional={"images": mostly(st.lists(entry), junk), "image": junk})
    row |= draw(mostly(fitting if marks else st.just({}), other, 6))
    strangers = draw(mostly(st.just({}), objects({"id": junk}, "row"), 2))
    return {**strangers, **row}


# ---- formats


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def written(folder: Path, row: dict[str, Any]) -> Iterator[Path]:
    """The row in each format that can hold it."""
    line = json.dumps(row)
    for name, data in (
        ("r.jsonl", line.encode()),
        ("r.json.gz", gzip.compress(f"[{line}]".encode())),
        ("r.json", f"[{line}]".encode("utf-16")),
    ):
        (folder / name).write_bytes(data)
        yield folder / name
    with tarfile.open(folder / "r.tar", "w") as archive:
        entry = tarfile.TarInfo("k.json")
        entry.size = len(line)
        archive.addfile(entry, io.BytesIO(line.encode()))
    yield folder / "r.tar"
    try:
        table = pa.Table.from_pylist([row])
        pq.write_table(table, folder / "r.parquet")
    except (pa.ArrowException, UnicodeEncodeError, pa.ArrowTypeError):
        return
    if {"messages", "conversations"} & set(table.column_names):
        yield folder / "r.parquet"


def checked(error: SampleError) -> str:
    assert error.reason
    assert error.detail.isprintable()
    assert 0 < len(error.detail) <= 500
    return error.reason


def found(path: Path, root: Path) -> tuple[list[Any], list[bytes]] | str:
    """As `read` gives it, or the reason."""
    dataset = Dataset(str(path), root)
    parsed = dataset.row(0)
    assert list(dataset.text_hashes()) == [parsed.text_sha256]
    told = dataset.unread()
    assert told is None or told.isprintable()
    assert parsed.id.isprintable()
    try:
        sample = parsed.sample()
    except SampleError as error:
        return checked(error)
    return [
        (turn.role, [None if isinstance(p, ImagePart) else p for p in turn.parts], turn.learnt) for turn in sample.turns
    ], list(sample.images)


COUNTS = {"used": 0, "skipped": 0}


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(row=rows())
def check_row(root: Path, folder: Path, row: dict[str, Any]) -> None:
    try:
        expected = read(row)
    except Skipped:
        expected = None
    for path in written(folder, row):
        result = found(path, root)
        assert (None if isinstance(result, str) else result) == expected, (path.name, result)
    COUNTS["skipped" if expected is None else "used"] += 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_rows_are_used_as_the_page_says_or_skipped_with_a_reason(root, tmp_path):
    check_row(root, tmp_path)
    assert min(COUNTS.values()) > 50, COUNTS


@pytest.mark.slow
@pytest.mark.timeout(60)
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda t: t.encode(errors="replace"))))
def test_files_of_anything_are_refused_in_words(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "anything"
    folder.mkdir(exist_ok=True)
    for suffix in (".json", ".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".tar"):
        path = folder / f"r{suffix}"
        path.write_bytes(data)
        try:
            dataset = Dataset(str(path))
            for row in range(dataset.n_rows):
                dataset.key(row)
        except EmkdError:
            continue
