"""The teacher's job: a pool of Ray actors that pull shards until none is missing, then the seal.

    manifest -> plan -> basis of codes, preflight -> create the cache -> missing shards -> workers -> seal

The same command, run again, computes the missing shards. Nothing is written before the preflight has succeeded, except
that `repair` withdraws damaged shards first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emkd.clock import clock_of_cache
from emkd.errors import DamagedCacheError, DataMismatchError, JobFailedError, UsageError
from emkd.interrupt import finish_on_interrupt
from emkd.pipeline.actors import start_workers
from emkd.pipeline.basis_choice import Choice
from emkd.pipeline.for_student import check_student
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.preflight import Estimate, choose_basis, preflight, study
from emkd.pipeline.progress import log, progress
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.shard_pool import Outcome, run_shards
from emkd.pipeline.skipped import SkipLimit
from emkd.pipeline.skipped_before import COLUMNS, again_if_mended, count_table, skipped_so_far
from emkd.pipeline.worker import ShardReport
from emkd.ray_session import session
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache
from emkd.storage.index.columns import Rows
from emkd.storage.index.commit import delete_lost_attempts, missing_shards
from emkd.storage.index.committed import read_committed, read_indexes
from emkd.storage.lifecycle.create import check_folder, create_cache, delete_unread_bases, refuse
from emkd.storage.lifecycle.extend import begin_extension, planned_extension
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.lifecycle.seal import read_seal, seal
from emkd.storage.lifecycle.verify import verify
from emkd.storage.manifest.conflicts import conflicts
from emkd.storage.manifest.manifest import FORMAT_VERSION, Manifest
from emkd.storage.manifest.plan import Extension
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import MANIFEST_NAME, committed_shards
from emkd.storage.objects.open import open_files
from emkd.units import size_text

SAME_ROWS = 8  # committed rows that a resumed run compares with its data


def cache_teacher(settings: JobSettings, *, extend: bool = False, repair: bool = False, clean: bool = False) -> Cache:
    """Run the teacher over the dataset and return the sealed cache.

    extend: add the rows that the cache lacks, of a larger or another dataset; what is committed stays
    repair: read every byte first, and rewrite damaged shards
    clean:  remove files that killed jobs left, once the cache is sealed; nothing else removes them

    Raises UsageError for a wrong call, CacheConflictError if the cache exists with other settings, DataMismatchError
    if committed rows have changed, CacheIncompleteError if shards of other data are missing, DamagedCacheError,
    CacheWriteError, JobFailedError if shards failed or too many rows were skipped, KeyboardInterrupt after
    Ctrl-C, Terminated after SIGTERM.
    What was committed stays in every case.
    """
    settings, dataset, run, tokenizer = _prepared(settings)
    files = open_files(settings.cache)
    if repair:
        _withdraw_damaged(settings, files, dataset, run, tokenizer)
        settings, dataset, run, tokenizer = _prepared(settings)  # of the format of a manifest that was written again
    plan = _planned(files, run, tokenizer, dataset, extend)
    limit = skipped_so_far(settings.max_skipped, files, plan.manifest)
    if limit.passed is not None:
        limit = again_if_mended(limit, files, plan.manifest, run, dataset)
    missing = _missing(files, plan, run)
    if missing:
        limit.check()
        files.check_writable()
        _check_same_rows(files, plan, run, dataset)
        log(f"{len(missing)} of {len(plan.manifest.shards)} shards to compute")
        with session(settings.address, workers=settings.workers, gpus_per_worker=settings.gpus_per_worker):
            _run(settings, files, plan, tokenizer, missing, limit)
    elif plan.extension is not None:  # its shards are committed: a plan that was lost is written again
        begin_extension(files, plan.extension)
    elif not conflicts(plan.manifest, run):
        create_cache(settings.cache, run, tokenizer)  # a killed run may have left it without its tokenizer
    _seal(settings, files)
    if clean:
        for name in [*delete_lost_attempts(files), *delete_unread_bases(files)]:
            log(f"removed {name}: nothing reads it")
    return Cache.open(settings.cache)


def estimate_job(settings: JobSettings, *, extend: bool = False, measure: Any = None) -> Estimate:
    """Estimate the size and time of `cache_teacher`, from a few rows that go through the teacher. Writes nothing.

    measure: what to find out about other settings (see `CaptureWorker.study`), if there is no cache yet

    For an unfinished cache, this is the cost of the missing shards; for a finished cache, the cost of making it again,
    and the log says so.
    """
    settings, dataset, run, tokenizer = _prepared(settings)
    files = open_files(settings.cache)
    plan = _planned(files, run, tokenizer, dataset, extend)
    missing = _missing(files, plan, run)
    if not missing:
        log("nothing is missing in the cache; the estimate is for making it again from scratch")
    shards = missing or list(plan.manifest.shards)
    limit = SkipLimit.of(settings.max_skipped, plan.manifest)
    if missing:
        limit = skipped_so_far(settings.max_skipped, files, plan.manifest)
    with session(settings.address, workers=settings.workers, gpus_per_worker=settings.gpus_per_worker):
        log(_loading(settings, 1))
        worker = start_workers(settings, plan.manifest, 1)[0]
        choice = choose_basis(worker, plan.manifest, shards)
        estimate = preflight(worker, settings, plan.manifest, shards, choice, limit=limit)
        if measure is None or files.exists(MANIFEST_NAME):
            return estimate
        return replace(estimate, study=study(worker, measure, plan.manifest, shards))


@dataclass(frozen=True)
class JobPlan:
    """The manifest that the job follows.

    extension: the last extension of the manifest, if it is not written yet
    """

    manifest: Manifest
    extension: Extension | None = None


def _prepared(settings: JobSettings) -> tuple[JobSettings, Dataset, Manifest, bytes]:
    """(settings with absolute paths, dataset, manifest and tokenizer.json as this run alone would write them)"""
    settings = settings.with_absolute_paths()
    log("reading the data, and hashing the teacher's weights")
    dataset = Dataset(settings.data, settings.image_root, settings.follow_links)
    unread = dataset.unread()
    if unread is not None:
        log(unread)
    existing = _existing(open_files(settings.cache))
    version = FORMAT_VERSION if existing is None else existing.format_version
    run, tokenizer = job_manifest(settings, dataset, version, existing)
    if existing is not None:
        clock_of_cache(settings.cache, run.tokenizer.chat_template, existing.clock, settings.clock)
    _say_what_exceeds_v(settings, run.vocabulary_size)
    if settings.for_student is not None:
        check_student(settings, run, tokenizer, dataset)
    return settings, dataset, run, tokenizer


def _say_what_exceeds_v(settings: JobSettings, n_tokens: int) -> None:
    """Log if more logits were asked for than a token has."""
    for flag, asked, default, tokens in (
        ("--top-k", settings.top_k, JobSettings.top_k, "vision"),
        ("--answer-top-k", settings.answer_top_k, JobSettings.answer_top_k, "answer"),
    ):
        if asked is not None and asked > n_tokens and asked != default:
            log(f"{flag} {asked}: the teacher has {n_tokens} ids; all {n_tokens} logits of {tokens} tokens are stored")


def _existing(files: Files) -> Manifest | None:
    """The manifest of the cache, whose format version and date a run keeps; None if there is none, or it is damaged."""
    try:
        return read_manifest(files, extensions=0) if files.exists(MANIFEST_NAME) else None
    except DamagedCacheError:  # --repair may replace it, and any other use of it fails with what is wrong
        return None


def _planned(files: Files, run: Manifest, tokenizer: bytes, dataset: Dataset, extend: bool) -> JobPlan:
    """The plan of this run, which agrees with the cache if there is one. Writes nothing.

    Raises CacheConflictError if the cache has other settings.
    """
    if not extend and not files.exists(MANIFEST_NAME):
        check_folder(files)
        return JobPlan(run)
    manifest = read_manifest(files)
    if not extend:
        refuse(files, conflicts(manifest, run))
        return JobPlan(manifest)
    log("looking for rows that the cache lacks")
    extension = planned_extension(files, run, tokenizer, dataset.keyed_rows)
    if extension is None:
        log("all rows of this data are in the cache or planned already")
        return JobPlan(manifest)
    return JobPlan(manifest.model_copy(update={"extensions": (*manifest.extensions, extension)}), extension)


def _missing(files: Files, plan: JobPlan, run: Manifest) -> list[int]:
    """The shards of this run's data that are not committed."""
    manifest = plan.manifest
    missing = missing_shards(files, manifest)
    return [n for n in missing if manifest.datasets[manifest.source(n)].fingerprint == run.dataset.fingerprint]


def _check_same_rows(files: Files, plan: JobPlan, run: Manifest, dataset: Dataset) -> None:
    """Raise DataMismatchError if a few committed rows have changed.

    The files of JSON data do not hold the images: another --image-root may have other images.
    """
    manifest, committed = plan.manifest, set(committed_shards(files))
    for shard in (n for n in manifest.shards if n in committed):
        if manifest.datasets[manifest.source(shard)].fingerprint != run.dataset.fingerprint:
            continue
        table = read_committed(files, shard, manifest).table.slice(0, SAME_ROWS)
        for row, key in zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True):
            found = dataset.key(row)
            if key and found != key:
                raise DataMismatchError(
                    f"{dataset.data}: row {row} is not what was cached: its key is {found or 'none (unreadable)'}, "
                    f"the cache has {key}. Its images changed, or --image-root has other images; use the "
                    "first run's --image-root"
                )
        return


def _withdraw_damaged(settings: JobSettings, files: Files, dataset: Dataset, run: Manifest, tokenizer: bytes) -> None:
    log("reading every byte of the cache")
    damages = verify(files.root)
    for damage in damages:
        log(f"damaged: {damage.name}: {damage.what}")
    shards = withdraw(files, damages, run, tokenizer, _older(settings, dataset, run))
    what = f"damaged objects: {len(damages)}; shards to rewrite: {len(shards)}"
    log(what if damages else "nothing is damaged")


def _older(settings: JobSettings, dataset: Dataset, run: Manifest) -> list[Manifest]:
    """The manifest that the same command had before there were codes, if it can have been run then."""
    try:
        return [job_manifest(settings, dataset, 3)[0]] if run.format_version > 3 else []
    except UsageError:  # it asks for codes
        return []


def _run(
    settings: JobSettings, files: Files, plan: JobPlan, tokenizer: bytes, missing: Sequence[int], limit: SkipLimit
) -> None:
    manifest = plan.manifest
    log(_loading(settings, min(settings.workers, len(missing))))
    workers = start_workers(settings, manifest, min(settings.workers, len(missing)))
    choice = choose_basis(workers[0], manifest, missing)
    estimate = preflight(
        workers[0], settings, manifest, missing, choice, fresh=not committed_shards(files), limit=limit
    )
    log(estimate.describe())
    estimate.check_skipped()
    estimate.check_space(settings.cache)
    if plan.extension is None:
        _create(settings, manifest, tokenizer, choice)
    else:
        begin_extension(files, plan.extension)
    rows = sum(len(manifest.rows(shard)) for shard in missing)
    basis = read_manifest(files, extensions=0).basis
    error = None if basis is None else basis.logit_error

    def done(report: ShardReport) -> None:
        limit.add(manifest.source(report.number), report.skipped)
        show(report)

    with progress(len(missing), rows, error) as show, finish_on_interrupt("finishing the current shards") as interrupt:
        outcome = run_shards(workers, missing, interrupt, done, lambda: limit.passed is not None)
    try:
        _check_outcome(settings, outcome, len(missing), estimate)
    except KeyboardInterrupt:
        raise interrupt.error() from None  # 143 after SIGTERM
    if outcome.left:
        limit.check(
            f". The job has stopped: {outcome.n_done} of {len(missing)} shards were committed, and the other "
            f"{len(outcome.left)} cannot change this"
        )


def _loading(settings: JobSettings, n_workers: int) -> str:
    """Say what is loaded before the first rows are tried."""
    where = f"{settings.gpus_per_worker:g} GPU each" if settings.gpus_per_worker else "the CPU"
    return (
        f"loading the teacher in {n_workers} {'worker' if n_workers == 1 else 'workers'}, on {where}; then a few rows"
    )


def _create(settings: JobSettings, manifest: Manifest, tokenizer: bytes, choice: Choice | None) -> None:
    if choice is None:
        create_cache(settings.cache, manifest, tokenizer)
        return
    basis = choice.basis.to_bytes()
    create_cache(settings.cache, manifest.with_basis(choice.basis.identity(basis)), tokenizer, basis)


def _check_outcome(settings: JobSettings, outcome: Outcome, n_shards: int, estimate: Estimate) -> None:
    open_shards = len(outcome.failed) + len(outcome.left)
    if outcome.first_failure is not None:
        number, error = outcome.first_failure
        stopped = f"; {len(outcome.left)} were not started" if outcome.left else ""
        raise JobFailedError(
            f"{len(outcome.failed)} of {n_shards} shards failed, {outcome.n_done} were committed{stopped}. Shard "
            f"{number}: {error}. The missing shards need about {size_text(estimate.bytes_of(open_shards))}; run the "
            "same command again to compute them"
        ) from error
    if outcome.interrupted and outcome.left:
        log(f"{outcome.n_done} of {n_shards} shards were committed; run the same command again to compute the other "
            f"{len(outcome.left)}")  # fmt: skip
        raise KeyboardInterrupt


def _seal(settings: JobSettings, files: Files) -> None:
    """Check the share of skipped rows and seal the cache; read the index of each shard once."""
    manifest = read_manifest(files)
    if read_seal(files) is not None:
        _check_skipped(settings, manifest, Cache.open(settings.cache).rows)
        seal(files)
        return
    there = set(committed_shards(files))
    committed = read_indexes(files, manifest, [n for n in manifest.shards if n in there], check_sizes=True)
    _check_skipped(settings, manifest, Rows.of(committed.table))
    seal(files, committed)


def _check_skipped(settings: JobSettings, manifest: Manifest, rows: Rows) -> None:
    """Raise JobFailedError if too many rows of a dataset were skipped: the call or the data are wrong."""
    limit = SkipLimit.of(settings.max_skipped, manifest, np.unique(rows.numbers("shard")).tolist())
    count_table(limit, manifest, rows.skipped(COLUMNS))
    limit.check()
