"""Extend a cache with more rows: plan the extension, and write its plan.

Every committed shard stays. Rows of the run that the cache already has are found by row number if they come from the
same files, and by key if not; the other rows make new shards.
"""

from collections.abc import Callable, Iterable, Sequence

from emkd.errors import CacheConflictError, CacheIncompleteError
from emkd.storage.index.commit import ShardIndex, missing_shards
from emkd.storage.index.committed import read_committed
from emkd.storage.lifecycle.create import refuse
from emkd.storage.manifest.conflicts import conflicts, setting_conflicts
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.plan import DatasetIdentity, Extension, FoundRows, as_ranges
from emkd.storage.manifest.read import extension_bytes, parse_extension, read_manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import TOKENIZER_NAME, plan_name

# Returns (row, key) of each row of a dataset, the key None if the row cannot be read. Called only if keys are needed.
KeyedRows = Callable[[], Iterable[tuple[int, str | None]]]
CachedRow = tuple[int, int]  # index of a dataset of the cache, row of this dataset


def extend_cache(files: Files, run: Manifest, tokenizer_json: bytes, keyed_rows: KeyedRows) -> Manifest:
    """Plan the rows of `run` that the cache lacks, durably, and return the manifest with the extension.

    Rows of an earlier plan are not planned again, so a second call changes nothing. Raises as planned_extension and
    begin_extension.
    """
    extension = planned_extension(files, run, tokenizer_json, keyed_rows)
    if extension is not None:
        begin_extension(files, extension)
    return read_manifest(files)


def planned_extension(files: Files, run: Manifest, tokenizer_json: bytes, keyed_rows: KeyedRows) -> Extension | None:
    """Return the extension that adds the rows of `run`, or None if the cache has or plans all of them. Writes nothing.

    Raises InputNotFoundError if there is no cache, CacheConflictError, which names the settings that differ, and
    CacheIncompleteError if planned shards are not committed: an extension keeps only committed shards and would drop
    them.
    """
    cache = read_manifest(files)
    differing = setting_conflicts(cache, run)
    if not differing and files.read(TOKENIZER_NAME) not in (tokenizer_json, None):
        differing = [f"{TOKENIZER_NAME}: the cache has a different tokenizer from this run"]
    refuse(files, differing)
    if not conflicts(cache, run):
        return None
    missing = missing_shards(files, cache)
    if missing:
        names = ", ".join(file.name for file in cache.datasets[cache.source(missing[0])].files)
        raise CacheIncompleteError(
            f"{files.root}: {len(missing)} of {len(cache.shards)} shards are not committed yet (the first is "
            f"{missing[0]}, of {names}); finish them first, with the command that planned them, before --extend"
        )
    kept = [read_committed(files, shard, cache) for shard in cache.shards]
    extension = plan_extension(cache, kept, run, keyed_rows)
    return extension if extension.n_added else None


def begin_extension(files: Files, extension: Extension) -> None:
    """Write the plan, durably. Raises CacheConflictError if another run has extended the cache with other rows."""
    name = plan_name(extension.number)
    if files.create(name, extension_bytes(extension)):
        return
    if parse_extension(files, extension.number).plan_sha256 != extension.plan_sha256:
        raise CacheConflictError(
            f"{files.where(name)}: another run added other rows to the cache meanwhile; run the same command again "
            "when that run is done"
        )


def plan_extension(cache: Manifest, kept: Sequence[ShardIndex], run: Manifest, keyed_rows: KeyedRows) -> Extension:
    """Return the next extension of `cache`, a pure function of the arguments and the rows.

    It keeps the shards of the indexes `kept` and adds the rows of `run` that none of these shards has.
    """
    cached = _cached_rows(cache, kept, run, keyed_rows)
    return Extension(
        number=len(cache.extensions) + 1,
        parent_sha256=cache.plan_sha256,
        dataset=run.dataset,
        n_rows=run.plan.n_rows,
        kept=as_ranges([index.shard for index in kept]),
        first_shard=cache.n_planned,
        rows_per_shard=run.plan.rows_per_shard,
        rows=as_ranges([row for row in range(run.plan.n_rows) if row not in cached]),
        found=_as_found_rows(cached),
        created_by=run.created_by,
    )


def _cached_rows(
    cache: Manifest, kept: Sequence[ShardIndex], run: Manifest, keyed_rows: KeyedRows
) -> dict[int, CachedRow]:
    """Map each row of `run` that the cache has to the row in the cache. Rows of other files, including skipped rows,
    are found by key."""
    cached: dict[int, CachedRow] = {}
    by_key: dict[str, CachedRow] = {}
    for index in kept:
        source = cache.source(index.shard)
        rows, keys = index.table["row"].to_pylist(), index.table["key"].to_pylist()
        if _same_files(cache.datasets[source], run.dataset):
            cached.update((row, (source, row)) for row in rows if row < run.plan.n_rows)
        else:
            for row, key in zip(rows, keys, strict=True):
                if key:
                    by_key.setdefault(key, (source, row))
    if by_key:
        for row, key in keyed_rows():
            if row < run.plan.n_rows and key is not None and key in by_key:
                cached.setdefault(row, by_key[key])
    return cached


def _same_files(first: DatasetIdentity, second: DatasetIdentity) -> bool:
    """Return whether equal row numbers of the two datasets mean the same row.

    Image roots must be equal. If neither manifest names one, the job checks on a few rows that the images are the same.
    """
    return (first.fingerprint, first.image_root) == (second.fingerprint, second.image_root)


def _as_found_rows(cached: dict[int, CachedRow]) -> tuple[FoundRows, ...]:
    """Return the rows that the cache has, with adjacent rows that are adjacent in the cache, too, as one entry."""
    found: list[FoundRows] = []
    for row, (source, source_row) in sorted(cached.items()):
        last = found[-1] if found else None
        following = (last.row + last.count, last.source, last.source_row + last.count) if last else None
        if last and following == (row, source, source_row):
            found[-1] = last.model_copy(update={"count": last.count + 1})
        else:
            found.append(FoundRows(row=row, source=source, source_row=source_row, count=1))
    return tuple(found)
