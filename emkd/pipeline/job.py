"""The teacher's job: a pool of Ray actors that pull shards until none is missing, then the seal.

    identify -> create the cache (or agree with it) -> preflight -> missing shards -> workers -> seal

A shard is captured at least once and committed exactly once: a killed actor is restarted and its shard tried
again, and a shard that fails for good does not stop the others. Running the same command again does what is
missing.
"""

import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emkd.errors import EmkdError, JobFailedError, UsageError
from emkd.pipeline.identify import identify
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker, Preflight, ShardReport
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache, create_cache
from emkd.storage.files import open_files
from emkd.storage.index import delete_lost_attempts, missing_shards
from emkd.storage.manifest import Manifest
from emkd.storage.seal import seal

PREFLIGHT_ROWS = 16
# A shard whose worker died is tried again this often.
RETRIES = 2


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
            f"{self.n_rows} rows: about {_size(self.n_bytes)} ({self.bytes_per_vision_token:.0f} bytes a vision "
            f"token, affinity and answers included) and {self.seconds:.0f} s; {_size(self.free_bytes)} free"
        )


def cache_teacher(settings: JobSettings, *, clean: bool = False) -> Cache:
    """Runs the teacher over the dataset and returns the sealed cache.

    clean: removes what killed runs left behind, once the cache is sealed; nothing else ever does

    Raises UsageError for a wrong call, CacheConflictError where the cache exists with other settings,
    JobFailedError where shards failed or too many rows were skipped. What was committed stays in any case.
    """
    settings = settings.with_absolute_paths()
    manifest, tokenizer = identify(settings, Dataset(settings.data, settings.image_root))
    files = create_cache(settings.cache, manifest, tokenizer)
    missing = missing_shards(files, manifest.plan)
    if missing:
        _log(f"{len(missing)} of {manifest.plan.n_shards} shards to do")
        with _ray(settings):
            _run(settings, manifest, missing)
    _check_skipped(settings, manifest)
    seal(files)
    if clean:
        for name in delete_lost_attempts(files):
            _log(f"removed {name}, which another attempt was faster than")
    return Cache.open(settings.cache)


def estimate_job(settings: JobSettings) -> Estimate:
    """What `cache_teacher` would cost, from a few rows that really go through the teacher; writes no cache."""
    settings = settings.with_absolute_paths()
    manifest, _ = identify(settings, Dataset(settings.data, settings.image_root))
    with _ray(settings):
        return _preflight(_workers(settings, manifest, 1)[0], settings, manifest, range(manifest.plan.n_shards))


def _run(settings: JobSettings, manifest: Manifest, missing: Sequence[int]) -> None:
    workers = _workers(settings, manifest, min(settings.workers, len(missing)))
    estimate = _preflight(workers[0], settings, manifest, missing)
    _log(estimate.describe())
    if estimate.n_bytes > estimate.free_bytes:
        raise JobFailedError(
            f"{settings.cache}: the job needs about {_size(estimate.n_bytes)} and {_size(estimate.free_bytes)} are "
            "free; make room, or store less with a smaller --top-k"
        )
    failed: dict[int, Exception] = {}
    with _progress(len(missing)) as show:
        for number, outcome in _pull(workers, list(missing)):
            if isinstance(outcome, Exception):
                failed[number] = outcome
            else:
                show(outcome)
    if failed:
        number, error = min(failed.items())
        raise JobFailedError(
            f"{len(failed)} of {len(missing)} shards failed, the others are committed. Shard {number}: {error}. "
            "Run the same command again to do what is missing"
        ) from error


def _pull(workers: Sequence[Any], shards: list[int]) -> Iterator[tuple[int, ShardReport | Exception]]:
    """Each worker gets its next shard when it is done with one; yields outcomes as they come."""
    waiting = list(reversed(shards))
    running: dict[Any, tuple[int, Any]] = {}
    for worker in workers:
        number = waiting.pop()
        running[worker.capture_shard.remote(number)] = (number, worker)
    while running:
        done, _ = ray.wait(list(running), num_returns=1)
        number, worker = running.pop(done[0])
        yield number, _outcome(done[0])
        if waiting:
            following = waiting.pop()
            running[worker.capture_shard.remote(following)] = (following, worker)


def _outcome(reference: Any) -> ShardReport | Exception:
    """A shard's report, or the error that it ended with: other shards go on, and the job fails at its end."""
    try:
        report: ShardReport = ray.get(reference)
        return report
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, EmkdError) else error
    except ray.exceptions.RayError as error:
        return error


def _preflight(worker: Any, settings: JobSettings, manifest: Manifest, shards: Sequence[int]) -> Estimate:
    """A few rows, evenly spread, through everything; fails here rather than hours later."""
    rows = [row for shard in shards for row in manifest.plan.rows(shard)]
    step = max(1, len(rows) // PREFLIGHT_ROWS)
    chosen = rows[::step][:PREFLIGHT_ROWS]
    try:
        seen: Preflight = ray.get(worker.preflight.remote(chosen))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, EmkdError) else error from None
    if len(seen.skipped) == seen.n_rows:
        raise JobFailedError(f"none of {seen.n_rows} rows looked at can be used; {seen.skipped[0]}")
    for line in seen.skipped:
        _log(f"preflight would skip {line}")
    share = len(rows) / seen.n_rows
    return Estimate(
        n_rows=len(rows),
        n_bytes=int(seen.n_bytes * share),
        bytes_per_vision_token=seen.n_bytes / max(1, seen.vision_tokens),
        seconds=seen.seconds * share / settings.workers,
        free_bytes=_free_bytes(open_files(settings.cache).root),
    )


def _check_skipped(settings: JobSettings, manifest: Manifest) -> None:
    """Too many skipped rows are a fault of the call or of the data, not something to train around."""
    skipped = Cache.open(settings.cache, partial=True).skipped.to_pylist()
    if len(skipped) > settings.max_skipped * manifest.plan.n_rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(row["reason"] for row in skipped).most_common())
        first = skipped[0]
        raise JobFailedError(
            f"{len(skipped)} of {manifest.plan.n_rows} rows were skipped ({reasons}), more than --max-skipped "
            f"{settings.max_skipped}; the first is row {first['row']} (id {first['id']!r}): {first['detail']}. "
            "Mend the data, or accept them by a larger --max-skipped: nothing is computed again"
        )


@contextmanager
def _ray(settings: JobSettings) -> Iterator[None]:
    """A Ray session: one of our own, ended at the end, or the cluster at `settings.address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"num_cpus": settings.workers, "include_dashboard": False}
    ray.init(
        address=settings.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        **({} if settings.address else own),
    )
    try:
        _check_resources(settings)
        yield
    finally:
        ray.shutdown()


def _check_resources(settings: JobSettings) -> None:
    """Ray would wait for ever for what the machine does not have."""
    have = ray.cluster_resources()
    needs = {"CPU": 1.0 * settings.workers, "GPU": settings.gpus_per_worker * settings.workers}
    for resource, need in needs.items():
        if have.get(resource, 0) < need:
            raise UsageError(
                f"{settings.workers} workers need {need:g} {resource}s and Ray has {have.get(resource, 0):g}; "
                + ("run on the CPU with --gpus-per-worker 0" if resource == "GPU" else "use fewer --workers")
            )


def _workers(settings: JobSettings, manifest: Manifest, count: int) -> list[Any]:
    actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(CaptureWorker)
    options = {"num_cpus": 1, "num_gpus": settings.gpus_per_worker}
    return [actor.options(**options).remote(settings, manifest) for _ in range(count)]


@contextmanager
def _progress(n_shards: int) -> Iterator[Callable[[ShardReport], None]]:
    """A bar on a terminal's stderr, a line a shard elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    totals: Counter[str] = Counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=n_shards, text="")

        def show(report: ShardReport) -> None:
            totals.update(samples=report.n_samples, skipped=report.n_skipped, bytes=report.n_bytes)
            text = f"{totals['samples']} samples, {totals['skipped']} skipped, {_size(totals['bytes'])}"
            bar.update(task, advance=1, text=text)
            if not console.is_terminal:
                _log(f"shard {report.number} done in {report.seconds:.1f} s; {text}")

        yield show


def _free_bytes(folder: Path) -> int:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _log(text: str) -> None:
    print(text, file=sys.stderr)
