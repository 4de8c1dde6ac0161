"""Rows of one WebDataset tar: the files of one key, such as 0017.json and 0017.jpg, are one row.

    key.json            the row's columns; without images among them, the key's pictures are its images
    key.txt             without a conversation in key.json: the answer to the key's pictures alone (a caption)
    key.jpg, key.png…   pictures, in the order of the tar; a path in key.json that names one of them means that picture
    any other file      a column of that name, which is not read (see known.py)

Opening a tar reads its headers. Files whose names begin with a dot are no data.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from emkd.errors import DataFormatError, SampleError
from emkd.samples.known import CONVERSATION_COLUMNS, IMAGE, IMAGE_COLUMNS, ROW, is_unread, name_kind, unread_in_rows
from emkd.samples.sources.source import RawRow, Source

N_TOLD = 64  # rows whose columns are looked at for `unread`


@dataclass(frozen=True)
class Member:
    """One file of a tar: where its bytes are."""

    name: str
    extension: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Key:
    """The files of one row."""

    name: str
    members: list[Member] = field(default_factory=list)

    def of(self, extension: str) -> Member | None:
        return next((member for member in self.members if member.extension.lower() == extension), None)

    @property
    def pictures(self) -> list[Member]:
        return [member for member in self.members if name_kind(member.extension.rpartition(".")[2]) == IMAGE]


class TarSource(Source):
    """Rows of one .tar file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._keys = _keys(path)
        except (tarfile.TarError, EOFError) as error:
            raise DataFormatError(f"{path} is not a whole tar file: {error}. Copy or download it again") from error
        self.n_rows = len(self._keys)

    def unread(self) -> set[str]:
        found = {m.extension for key in self._keys for m in key.members if m.extension not in ("json", "txt")}
        rows = []
        for row in self.texts(N_TOLD):
            if not isinstance(row, SampleError):
                rows.append(row)
        return {name for name in found if is_unread(ROW, name)} | unread_in_rows(rows)

    def row(self, index: int) -> RawRow:
        key = self._keys[index]
        row = self._text(key)
        pictures = key.pictures
        entries = [{"bytes": self._read(member), "path": member.name} for member in pictures]
        named = next((name for name in IMAGE_COLUMNS if row.get(name)), None)
        if named is None and not _brings_own(row):
            row["images"] = entries
        elif named is not None:
            row[named], n_used = _with_pictures(row[named], dict(zip(pictures, entries, strict=True)))
            if n_used < len(pictures):
                raise SampleError(
                    "contradictory", f"key {key.name!r:.200} has {len(pictures)} pictures, its {named!r} names {n_used}"
                )
        elif pictures:
            raise SampleError(
                "contradictory", f"key {key.name!r:.200} has pictures, and parts of its messages bring their own"
            )
        return row

    def texts(self, n_rows: int | None = None) -> Iterator[RawRow | SampleError]:
        for key in self._keys[:n_rows]:
            try:
                yield self._text(key)
            except SampleError as error:
                yield error

    def _text(self, key: Key) -> RawRow:
        """The row without its pictures. Raises SampleError."""
        found, said = key.of("json"), key.of("txt")
        row = {} if found is None else _object(found.name, self._read(found))
        row.setdefault("id", key.name)
        conversation = any(row.get(name) for name in CONVERSATION_COLUMNS)
        for member in key.members:
            if member in (found, said) or member in key.pictures:
                continue
            row.setdefault(member.extension, f"{member.n_bytes} bytes")
        if said is not None and conversation:
            row.setdefault("txt", "")
        elif said is not None:
            row["messages"] = _caption(said.name, self._read(said), len(key.pictures))
        return row

    def _read(self, member: Member) -> bytes:
        with self.path.open("rb") as file:
            data = os.pread(file.fileno(), member.n_bytes, member.offset)
        if len(data) != member.n_bytes:
            raise DataFormatError(
                f"{self.path}: {member.name} is cut short: {len(data)} of {member.n_bytes} bytes. Copy or download the "
                "file again"
            )
        return data


def _keys(path: Path) -> list[Key]:
    """The keys of a tar, in its order. Raises tarfile.TarError."""
    found: dict[str, Key] = {}
    with tarfile.open(path, "r:") as tar:
        for entry in tar:
            name = PurePosixPath(entry.name)
            if not entry.isreg() or any(part.startswith(".") and part != "." for part in name.parts):
                continue
            stem, _, extension = name.name.partition(".")
            key = str(name.parent / stem)
            member = Member(entry.name, extension, entry.offset_data, entry.size)
            found.setdefault(key, Key(key)).members.append(member)
    return list(found.values())


def _object(name: str, data: bytes) -> RawRow:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad-content", f"{name!r:.200} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise SampleError("bad-content", f"{name!r:.200} is a {type(found).__name__}, expected an object")
    return found


def _caption(name: str, data: bytes, n_pictures: int) -> list[dict[str, Any]]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SampleError("bad-content", f"{name!r:.200} is not valid UTF-8: {error.reason}") from error
    question = [{"type": "image"}] * n_pictures
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text.strip()}]


def _brings_own(row: RawRow) -> bool:
    """Whether parts of the messages bring their own pictures."""
    turns: Any = next((row[name] for name in CONVERSATION_COLUMNS if row.get(name)), [])
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and any(
                part.get(name) for name in ("image", "image_url", "url", "bytes", "path")
            ):
                return True
    return False


def _with_pictures(value: Any, pictures: dict[Member, dict[str, Any]]) -> tuple[Any, int]:
    """The image entries with the pictures that they name, and how many pictures are used."""
    entries = value if isinstance(value, list) else [value]
    used: set[Member] = set()
    found = []
    for entry in entries:
        path = entry.get("path") if isinstance(entry, dict) and not entry.get("bytes") else entry
        match = next((m for m in pictures if isinstance(path, str) and path in (m.name, m.extension)), None)
        if match is None and isinstance(path, str):
            match = next((m for m in pictures if PurePosixPath(m.name).name == PurePosixPath(path).name), None)
        used |= set() if match is None else {match}
        found.append(entry if match is None else pictures[match])
    return found, len(used)
