"""The teacher's job: a pool of Ray actors that pull shards until none is missing, then the seal.

    identify -> create the cache (or agree with it) -> preflight -> missing shards -> workers -> seal

A shard is captured at least once and committed exactly once: a killed actor is restarted and its shard tried
again, and a shard that fails for good does not stop the others. Running the same command again does what is
missing.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from emkd.errors import EmkdError, JobFailedError
from emkd.pipeline.cluster import result_of, session, start_workers
from emkd.pipeline.identify import identify
from emkd.pipeline.preflight import Estimate, preflight
from emkd.pipeline.progress import log, progress, size_text
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import ShardReport
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache, create_cache
from emkd.storage.index import delete_lost_attempts, missing_shards
from emkd.storage.manifest import Manifest
from emkd.storage.seal import seal


def cache_teacher(settings: JobSettings, *, clean: bool = False) -> Cache:
    """Runs the teacher over the dataset and returns the sealed cache.

    clean: removes what killed runs left behind, once the cache is sealed; nothing else ever does

    Raises UsageError for a wrong call, CacheConflictError where the cache exists with other settings,
    JobFailedError where shards failed or too many rows were skipped. What was committed stays in any case.
    """
    settings = settings.with_absolute_paths()
    manifest, tokenizer = identify(settings, Dataset(settings.data, settings.image_root))
    files = create_cache(settings.cache, manifest, tokenizer)
    missing = missing_shards(files, manifest)
    if missing:
        log(f"{len(missing)} of {manifest.plan.n_shards} shards to do")
        with session(settings):
            _run(settings, manifest, missing)
    _check_skipped(settings, manifest)
    seal(files)
    if clean:
        for name in delete_lost_attempts(files):
            log(f"removed {name}, which another attempt was faster than")
    return Cache.open(settings.cache)


def estimate_job(settings: JobSettings) -> Estimate:
    """What `cache_teacher` would cost, from a few rows that really go through the teacher; writes no cache."""
    settings = settings.with_absolute_paths()
    manifest, _ = identify(settings, Dataset(settings.data, settings.image_root))
    with session(settings):
        return preflight(start_workers(settings, manifest, 1)[0], settings, manifest, range(manifest.plan.n_shards))


def _run(settings: JobSettings, manifest: Manifest, missing: Sequence[int]) -> None:
    workers = start_workers(settings, manifest, min(settings.workers, len(missing)))
    estimate = preflight(workers[0], settings, manifest, missing)
    log(estimate.describe())
    if estimate.n_bytes > estimate.free_bytes:
        raise JobFailedError(
            f"{settings.cache}: the job needs about {size_text(estimate.n_bytes)} and "
            f"{size_text(estimate.free_bytes)} are free; make room, or store less with a smaller --top-k"
        )
    failed: dict[int, EmkdError] = {}
    with progress(len(missing)) as show:
        for number, outcome in _pull(workers, list(missing)):
            if isinstance(outcome, EmkdError):
                failed[number] = outcome
            else:
                show(outcome)
    if failed:
        number, error = min(failed.items())
        raise JobFailedError(
            f"{len(failed)} of {len(missing)} shards failed, the others are committed. Shard {number}: {error}. "
            "Run the same command again to do what is missing"
        ) from error


def _pull(workers: Sequence[Any], shards: list[int]) -> Iterator[tuple[int, ShardReport | EmkdError]]:
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


def _outcome(reference: Any) -> ShardReport | EmkdError:
    """A shard's report, or the error that it ended with: other shards go on, and the job fails at its end."""
    try:
        report: ShardReport = result_of(reference)
        return report
    except EmkdError as error:
        return error


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
