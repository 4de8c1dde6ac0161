"""The teacher's job: a pool of Ray actors that pull shards until none is missing, then the seal.

    identify -> plan -> preflight -> create the cache -> missing shards -> workers -> seal

Running the same command again does what is missing. Nothing is written before the preflight has gone well, but
for `extend` and `repair`, which change the plan of a cache that is there.
"""

from collections import Counter
from collections.abc import Sequence

from emkd.errors import JobFailedError
from emkd.pipeline.cluster import session, start_workers
from emkd.pipeline.for_student import check_student
from emkd.pipeline.identify import identify
from emkd.pipeline.interrupt import finish_on_interrupt
from emkd.pipeline.preflight import Estimate, preflight
from emkd.pipeline.progress import log, progress, size_text
from emkd.pipeline.pull import Outcome, pull
from emkd.pipeline.settings import JobSettings
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache
from emkd.storage.create import check_place, create_cache
from emkd.storage.described import read_manifest
from emkd.storage.extend import extend_cache, planned_extension
from emkd.storage.files import LocalFiles, open_files
from emkd.storage.index import delete_lost_attempts, missing_shards
from emkd.storage.manifest import MANIFEST_NAME, Manifest
from emkd.storage.repair import withdraw
from emkd.storage.seal import seal
from emkd.storage.verification import verify


def cache_teacher(settings: JobSettings, *, extend: bool = False, repair: bool = False, clean: bool = False) -> Cache:
    """Runs the teacher over the dataset and returns the sealed cache.

    extend: adds rows that the cache lacks, of a larger or another dataset; what is committed stays
    repair: reads every byte first, and makes damaged shards anew
    clean:  removes what killed runs left behind, once the cache is sealed; nothing else ever does

    Raises UsageError for a wrong call, CacheConflictError where the cache exists with other settings,
    JobFailedError where shards failed or too many rows were skipped, KeyboardInterrupt after Ctrl-C. What was
    committed stays in any case.
    """
    settings = settings.with_absolute_paths()
    dataset = Dataset(settings.data, settings.image_root)
    run, tokenizer = identify(settings, dataset)
    if settings.for_student is not None:
        check_student(settings, run, tokenizer, dataset)
    files = open_files(settings.cache)
    if repair:
        _withdraw_damaged(files, run, tokenizer)
    if extend:
        _extend(files, run, tokenizer, dataset)
    manifest = _agreed(files, run, tokenizer)
    missing = _missing(files, manifest, run)
    if missing:
        log(f"{len(missing)} of {len(manifest.shards)} shards to do")
        with session(settings):
            _run(settings, files, manifest, tokenizer, missing)
    _check_skipped(settings, manifest)
    seal(files)
    if clean:
        for name in delete_lost_attempts(files):
            log(f"removed {name}: nothing reads it")
    return Cache.open(settings.cache)


def estimate_job(settings: JobSettings, *, extend: bool = False) -> Estimate:
    """What `cache_teacher` would cost, from a few rows that really go through the teacher; writes no cache.

    Of a cache that is there, what is missing; of a whole one, what it would cost again.
    """
    settings = settings.with_absolute_paths()
    dataset = Dataset(settings.data, settings.image_root)
    run, tokenizer = identify(settings, dataset)
    if settings.for_student is not None:
        check_student(settings, run, tokenizer, dataset)
    files = open_files(settings.cache)
    manifest = _extended(files, run, tokenizer, dataset) if extend else _agreed(files, run, tokenizer)
    missing = _missing(files, manifest, run)
    with session(settings):
        worker = start_workers(settings, manifest, 1)[0]
        return preflight(worker, settings, manifest, missing or list(manifest.shards))


def _agreed(files: LocalFiles, run: Manifest, tokenizer: bytes) -> Manifest:
    """The manifest of the cache that is there, which agrees with this run, or this run's own; nothing is written."""
    if not files.exists(MANIFEST_NAME):
        check_place(files)
        return run
    create_cache(files.root, run, tokenizer)
    return read_manifest(files)


def _extend(files: LocalFiles, run: Manifest, tokenizer: bytes, dataset: Dataset) -> None:
    log("looking for rows that the cache lacks")
    before = read_manifest(files).shards
    after = extend_cache(files, run, tokenizer, dataset.keyed_rows).shards
    left = len(set(before) - set(after))
    if left:
        log(f"{left} planned shards that nobody committed leave the plan; their rows are done where this data has them")


def _extended(files: LocalFiles, run: Manifest, tokenizer: bytes, dataset: Dataset) -> Manifest:
    """As extend_cache would leave it; nothing is written."""
    manifest = read_manifest(files)
    extension = planned_extension(files, run, tokenizer, dataset.keyed_rows)
    added = () if extension is None else (extension,)
    return manifest.model_copy(update={"extensions": (*manifest.extensions, *added)})


def _missing(files: LocalFiles, manifest: Manifest, run: Manifest) -> list[int]:
    """The shards that are not committed and have rows of this run's data."""
    missing = missing_shards(files, manifest)
    return [n for n in missing if manifest.datasets[manifest.source(n)].fingerprint == run.dataset.fingerprint]


def _withdraw_damaged(files: LocalFiles, run: Manifest, tokenizer: bytes) -> None:
    log("reading every byte of the cache")
    damages = verify(files.root)
    for damage in damages:
        log(f"damaged: {damage.name}: {damage.what}")
    shards = withdraw(files, damages, run, tokenizer)
    what = f"{len(damages)} objects are damaged, {len(shards)} shards have to be made anew"
    log(what if damages else "nothing is damaged")


def _run(
    settings: JobSettings, files: LocalFiles, manifest: Manifest, tokenizer: bytes, missing: Sequence[int]
) -> None:
    workers = start_workers(settings, manifest, min(settings.workers, len(missing)))
    estimate = preflight(workers[0], settings, manifest, missing)
    log(estimate.describe())
    estimate.check_space(settings.cache)
    if not files.exists(MANIFEST_NAME):
        create_cache(settings.cache, manifest, tokenizer)
    rows = sum(len(manifest.rows(shard)) for shard in missing)
    with progress(len(missing), rows) as show, finish_on_interrupt() as interrupt:
        outcome = pull(workers, missing, interrupt, show)
    _check_outcome(settings, outcome, len(missing), estimate)


def _check_outcome(settings: JobSettings, outcome: Outcome, n_shards: int, estimate: Estimate) -> None:
    open_shards = len(outcome.failed) + len(outcome.left)
    if outcome.failed:
        number, error = min(outcome.failed.items())
        stopped = f"; {len(outcome.left)} were not begun" if outcome.left else ""
        raise JobFailedError(
            f"{len(outcome.failed)} of {n_shards} shards failed, {len(outcome.done)} were committed{stopped}. Shard "
            f"{number}: {error}. What is missing needs about {size_text(estimate.bytes_of(open_shards))}; run the same "
            "command again to do it"
        ) from error
    if outcome.interrupted and outcome.left:
        log(f"{len(outcome.done)} of {n_shards} shards were committed; run the same command again to do the other "
            f"{len(outcome.left)}")  # fmt: skip
        raise KeyboardInterrupt


def _check_skipped(settings: JobSettings, manifest: Manifest) -> None:
    """Too many skipped rows are a fault of the call or of the data, not something to train around."""
    skipped = Cache.open(settings.cache, partial=True).skipped.to_pylist()
    if len(skipped) > settings.max_skipped * manifest.n_rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(row["reason"] for row in skipped).most_common())
        first = skipped[0]
        raise JobFailedError(
            f"{len(skipped)} of {manifest.n_rows} rows were skipped ({reasons}), more than --max-skipped "
            f"{settings.max_skipped}; the first is row {first['row']} (id {first['id']!r}): {first['detail']}. "
            "Mend the data, or accept them by a larger --max-skipped: nothing is computed again"
        )
