"""Before the long run: a few rows through everything, and from them the size and time of the whole."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emkd.errors import JobFailedError
from emkd.pipeline.cluster import result_of
from emkd.pipeline.progress import log, size_text
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import Preflight
from emkd.storage.files import open_files
from emkd.storage.manifest import Manifest

PREFLIGHT_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the whole job will cost, from the preflight's rows."""

    n_rows: int
    n_bytes: int
    bytes_per_vision_token: float
    seconds: float
    free_bytes: int

    def describe(self) -> str:
        return (
            f"{self.n_rows} rows: about {size_text(self.n_bytes)} ({self.bytes_per_vision_token:.0f} bytes a vision "
            f"token, affinity and answers included) and {self.seconds:.0f} s; {size_text(self.free_bytes)} free"
        )


def preflight(worker: Any, settings: JobSettings, manifest: Manifest, shards: Sequence[int]) -> Estimate:
    """A few rows, evenly spread, through everything; fails here rather than hours later."""
    rows = [row for shard in shards for row in manifest.plan.rows(shard)]
    step = max(1, len(rows) // PREFLIGHT_ROWS)
    chosen = rows[::step][:PREFLIGHT_ROWS]
    seen: Preflight = result_of(worker.preflight.remote(chosen))
    if len(seen.skipped) == seen.n_rows:
        raise JobFailedError(f"none of {seen.n_rows} rows looked at can be used; {seen.skipped[0]}")
    if not seen.end_token:
        log("the chat template writes no end token behind answers: students will not learn where to stop")
    for line in seen.skipped:
        log(f"preflight would skip {line}")
    share = len(rows) / seen.n_rows
    return Estimate(
        n_rows=len(rows),
        n_bytes=int(seen.n_bytes * share),
        bytes_per_vision_token=seen.n_bytes / max(1, seen.vision_tokens),
        seconds=seen.seconds * share / settings.workers,
        free_bytes=_free_bytes(open_files(settings.cache).root),
    )


def _free_bytes(folder: Path) -> int:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
