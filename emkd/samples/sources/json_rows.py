"""Rows of one JSON array or JSONL file, all of them in memory; images are named by path or stored as base64.

A .json file may hold lines as well: many writers name JSONL so.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emkd.errors import DataFormatError, SampleError
from emkd.samples.image_entry import is_path
from emkd.samples.known import CONTENT_KEYS, CONVERSATION_COLUMNS, IMAGE_COLUMNS, OWN_IMAGE_KEYS, unread_in_rows
from emkd.samples.sources.source import SEE, RawRow, Source


class JsonSource(Source):
    """Rows of one .json, .jsonl or .ndjson file, also .gz."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        self._digest = hashlib.sha256(data).hexdigest()
        if path.suffix.lower() == ".gz":
            data = _unpacked(path, data)
        data = _as_utf8(path, data)
        self._rows = _rows(path, data)
        self.n_rows = len(self._rows)

    def digest(self) -> str:
        return self._digest

    def row(self, index: int) -> RawRow:
        return self._rows[index]

    def texts(self) -> Iterator[RawRow | SampleError]:
        return iter(self._rows)

    def unread(self) -> set[str]:
        return unread_in_rows(self._rows)

    def names_paths(self) -> bool:
        return any(is_path(entry) for row in self._rows for entry in _image_entries(row))


def _image_entries(row: RawRow) -> Iterator[Any]:
    """Everything in a row that is an image entry."""
    for name in IMAGE_COLUMNS:
        value = row.get(name)
        yield from value if isinstance(value, list) else [value]
    turns = (turn for name in CONVERSATION_COLUMNS for turn in _objects(row.get(name)))
    for part in (part for turn in turns for name in CONTENT_KEYS for part in _objects(turn.get(name))):
        if part.get("type") != "text":
            yield from (part[name] for name in OWN_IMAGE_KEYS if name in part)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFormatError(f"{path}: not a whole gzip file: {error}. Copy or download the file again") from error


def _as_utf8(path: Path, data: bytes) -> bytes:
    """The same text in UTF-8, without a byte order mark: lines of UTF-16, as Windows writes, are no lines of bytes."""
    encoding = json.detect_encoding(data)
    if encoding == "utf-8":
        return data
    try:
        return data.decode(encoding).encode()
    except UnicodeError as error:
        raise DataFormatError(f"{path}: begins as {encoding}, and is not: {error}. Save the file as UTF-8") from error


def _rows(path: Path, data: bytes) -> list[RawRow]:
    """Raises DataFormatError with the place of what is wrong."""
    if ".json" not in (suffix.lower() for suffix in path.suffixes[-2:]):
        return list(_jsonl_rows(path, data))
    if data.lstrip()[:1] == b"{" and b"\n" in data.strip():
        first = data.lstrip().split(b"\n", 1)[0]
        try:
            json.loads(first)
        except ValueError:  # one object over several lines
            pass
        else:
            return list(_jsonl_rows(path, data))
    return _json_rows(path, data)


def _json_rows(path: Path, data: bytes) -> list[RawRow]:
    found = _parsed(path, data)
    if not isinstance(found, list):
        raise DataFormatError(f"{path} must hold a list of objects, one per sample; it is {_kind(found)}. {SEE}")
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise DataFormatError(f"{path}, row {number}: is {_kind(row)}, expected an object. {SEE}")
    return found


def _jsonl_rows(path: Path, data: bytes) -> Iterator[RawRow]:
    """A row for each line that is not blank."""
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        row = _parsed(path, line, number)
        if not isinstance(row, dict):
            raise DataFormatError(f"{path}, line {number}: is {_kind(row)}, expected an object, one per sample. {SEE}")
        yield row


def _parsed(path: Path, data: bytes, line: int | None = None) -> Any:
    """Parse a JSON file, or one line of a JSONL file. Raises DataFormatError with line and column.

    line: 1-based, of a JSONL file
    """
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        hint = "; one object per line is JSONL: name the file .jsonl" if error.msg == "Extra data" else ""
        where = f"line {line or error.lineno}, column {error.colno}"
        raise DataFormatError(f"{path}, {where}: not valid JSON: {error.msg}{hint if line is None else ''}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of too many digits, nested too deeply
        where = "" if line is None else f", line {line}"
        raise DataFormatError(f"{path}{where}: not valid JSON: {error}") from error


def _kind(value: Any) -> str:
    """The type of a value, as JSON names it."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
