"""Checkpoints that are whole or do not count.

    checkpoint-<step>/      what transformers.Trainer saves: weights, optimizer, scheduler, random states, its own state
        complete.json       size and SHA-256 of every other file; written last

A run that is killed while it saves leaves a folder without complete.json: it is passed over, and an older checkpoint,
which is only removed once a newer one is complete, is gone on from. A checkpoint that is complete and was changed
afterwards is an error.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emkd.errors import DamagedCheckpointError
from emkd.storage.objects.digest import canonical_json, open_envelope, seal_envelope
from emkd.storage.objects.disk import sync, write_durably

COMPLETE_NAME = "complete.json"


def checkpoints(output: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, by their step."""
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def complete(checkpoint: Path) -> None:
    """Vouch for all files of a checkpoint, once they are on the disk."""
    digests = {}
    for file in _files(checkpoint):
        sync(file)
        digests[str(file.relative_to(checkpoint))] = _digest(file)
    partial = checkpoint / f".{COMPLETE_NAME}.partial"
    partial.unlink(missing_ok=True)
    write_durably(partial, canonical_json(seal_envelope({"files": digests})))
    os.replace(partial, checkpoint / COMPLETE_NAME)
    sync(checkpoint)
    sync(checkpoint.parent)


def last_complete(output: Path, log: Callable[[str], None], *, verify: bool = True) -> Path | None:
    """The newest complete checkpoint; None where there is none. Those that a killed run left half are told.

    verify: whether every byte is read and checked; one of several ranks is enough for it

    DamagedCheckpointError where a file of it is missing or not as it was saved.
    """
    for checkpoint in reversed(checkpoints(output)):
        if (checkpoint / COMPLETE_NAME).is_file():
            if verify:
                check(checkpoint)
            return checkpoint
        log(f"{checkpoint} is not complete: the run ended while it was saved; passed over")
    return None


def check(checkpoint: Path) -> None:
    """Raises DamagedCheckpointError unless every file is as it was saved."""
    where = checkpoint / COMPLETE_NAME
    try:
        expected = open_envelope(str(where), where.read_bytes())["files"]
    except OSError as error:
        raise DamagedCheckpointError(f"{where}: cannot be read as it was written. {_next_step(checkpoint)}") from error
    for name, digest in expected.items():
        file = checkpoint / name
        found = _digest(file) if file.is_file() else None
        if found != digest:
            raise DamagedCheckpointError(
                f"{file} is not as it was saved: expected {_shown(digest)}, {_shown(found)} found. "
                + _next_step(checkpoint)
            )


def _shown(digest: dict[str, Any] | None) -> str:
    return "nothing" if digest is None else f"{digest['n_bytes']:,} bytes with SHA-256 {digest['sha256'][:12]}"


def _next_step(checkpoint: Path) -> str:
    return f"Remove {checkpoint} to go on from the checkpoint before it, or from the beginning"


def _files(checkpoint: Path) -> Iterator[Path]:
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != COMPLETE_NAME and not file.name.endswith(".partial"):
            yield file


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"n_bytes": file.stat().st_size, "sha256": sha256}
