"""Complete checkpoints: a checkpoint is complete once all of it is on the disk.

    checkpoint-<step>/      what transformers.Trainer saves: weights, optimizer, scheduler, random states, its own state
        complete.json       size and SHA-256 of every other file; written last

A run that is killed while it saves leaves a folder without complete.json. That folder is ignored, and the run resumes
from an older checkpoint, which is deleted only once a newer one is complete. A complete checkpoint that was changed
afterwards is an error.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emkd.errors import DamagedCheckpointError
from emkd.storage.objects.digest import canonical_json, open_envelope, seal_envelope
from emkd.storage.objects.disk import sync, write_durably

COMPLETE_NAME = "complete.json"
OPTIMIZER_NAME = "optimizer.pt"
SHARDED_OPTIMIZER_NAME = "optimizer"  # a folder (sharded.py)


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoint folders of an output folder, complete or not, by ascending step."""
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def has_optimizer(checkpoint: Path) -> bool:
    """Whether the optimizer's state was saved (training.save_only_model leaves it out)."""
    return (checkpoint / OPTIMIZER_NAME).is_file() or (checkpoint / SHARDED_OPTIMIZER_NAME).is_dir()


def complete(checkpoint: Path) -> None:
    """Write complete.json, after syncing all files of a checkpoint to the disk."""
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


def rotate(output: Path, limit: int | None, newest: Path, best: Path | None) -> None:
    """Delete the checkpoints of the smallest steps, so that at most `limit` are left; None deletes nothing.

    newest: the checkpoint that was just completed, which stays;  best: stays too, and counts

    Times of files decide nothing: a copy or another machine's clock may have changed them. Folders that are incomplete
    do not count, and go if they are older than the newest checkpoint.
    """
    if limit is None:
        return
    older = [path for path in checkpoints(output) if step_of(path) < step_of(newest)]
    done = [path for path in older if (path / COMPLETE_NAME).is_file()]
    free = [path for path in done if best is None or path.name != best.name]
    n_others = limit - 1 - (len(done) - len(free))
    for path in [*(path for path in older if path not in done), *free[: len(free) - max(0, n_others)]]:
        shutil.rmtree(path, ignore_errors=True)


def last_complete(output: Path, log: Callable[[str], None], *, verify: bool = True) -> Path | None:
    """Return the newest complete checkpoint, or None; log the incomplete checkpoints that are newer.

    verify: whether to read and check every byte; it is enough if one of several ranks does

    Raises DamagedCheckpointError if a file is missing or not as it was saved.
    """
    for checkpoint in reversed(checkpoints(output)):
        if (checkpoint / COMPLETE_NAME).is_file():
            if verify:
                check(checkpoint)
            return checkpoint
        log(f"{checkpoint} is incomplete, because the run ended while it was saved: ignoring it")
    return None


def check(checkpoint: Path) -> None:
    """Raise DamagedCheckpointError unless every file is as it was saved."""
    where = checkpoint / COMPLETE_NAME
    try:
        expected = open_envelope(str(where), where.read_bytes())["files"]
    except OSError as error:
        raise DamagedCheckpointError(f"{where} is damaged or cannot be read. {_next_step(checkpoint)}") from error
    for name, digest in expected.items():
        file = checkpoint / name
        found = _digest(file) if file.is_file() else None
        if found != digest:
            raise DamagedCheckpointError(
                f"{file} is not as it was saved: expected {_shown(digest)}, found {_shown(found)}. "
                + _next_step(checkpoint)
            )


def _shown(digest: dict[str, Any] | None) -> str:
    return "nothing" if digest is None else f"{digest['n_bytes']:,} bytes with SHA-256 {digest['sha256'][:12]}"


def _next_step(checkpoint: Path) -> str:
    return f"Remove {checkpoint} to resume from the checkpoint before it, or from the first step"


def _files(checkpoint: Path) -> Iterator[Path]:
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != COMPLETE_NAME and not file.name.endswith(".partial"):
            yield file


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"n_bytes": file.stat().st_size, "sha256": sha256}
