"""More rows for a cache: the plan of an extension, and its beginning on disk.

Every shard that is committed stays. Of the rows asked for, those that the cache has are found by their place
where they come from the same files, and by their key where they do not; the others make new shards.
"""

from collections.abc import Callable, Iterable, Sequence

from emkd.errors import CacheConflictError, CacheIncompleteError
from emkd.storage.index.commit import ShardIndex, missing_shards
from emkd.storage.lifecycle.create import refuse
from emkd.storage.lifecycle.seal import read_committed
from emkd.storage.manifest.conflicts import conflicts, setting_conflicts
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.plan import DatasetIdentity, Extension, FoundRows, as_ranges
from emkd.storage.manifest.read import extension_bytes, parse_extension, read_manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import TOKENIZER_NAME, plan_name

# Row and key of each row of a dataset, None for a row that cannot be read; called only where keys are needed.
KeyedRows = Callable[[], Iterable[tuple[int, str | None]]]
Place = tuple[int, int]  # number of the dataset, row in it


def extend_cache(files: Files, run: Manifest, tokenizer_json: bytes, keyed_rows: KeyedRows) -> Manifest:
    """Plan the rows of `run` that the cache lacks, durably; the manifest as it is then.

    Rows that an earlier plan has are not planned twice, so calling it again changes nothing. Errors as
    planned_extension and begin_extension.
    """
    extension = planned_extension(files, run, tokenizer_json, keyed_rows)
    if extension is not None:
        begin_extension(files, extension)
    return read_manifest(files)


def planned_extension(files: Files, run: Manifest, tokenizer_json: bytes, keyed_rows: KeyedRows) -> Extension | None:
    """The extension that `run` makes of a cache, None where the cache has or plans all its rows; nothing is written.

    InputNotFoundError where there is no cache; CacheConflictError names settings that differ; CacheIncompleteError
    where planned shards are not committed: an extension keeps what is committed, and would drop them.
    """
    cache = read_manifest(files)
    differing = setting_conflicts(cache, run)
    if not differing and files.read(TOKENIZER_NAME) not in (tokenizer_json, None):
        differing = [f"{TOKENIZER_NAME}: the cache has another tokenizer than this run"]
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
    """Write the plan, durably. CacheConflictError where another run has extended the cache in another way."""
    name = plan_name(extension.number)
    if files.create(name, extension_bytes(extension)):
        return
    if parse_extension(files, extension.number).plan_sha256 != extension.plan_sha256:
        raise CacheConflictError(
            f"{files.where(name)}: another run added other rows to the cache meanwhile; run the same command again "
            "when it is done"
        )


def plan_extension(cache: Manifest, kept: Sequence[ShardIndex], run: Manifest, keyed_rows: KeyedRows) -> Extension:
    """The next extension of `cache`: it keeps the shards of the indexes `kept` and adds the rows of `run` that
    none of them has. A pure function of its arguments and the rows."""
    places = _places(cache, kept, run, keyed_rows)
    return Extension(
        number=len(cache.extensions) + 1,
        parent_sha256=cache.plan_sha256,
        dataset=run.dataset,
        n_rows=run.plan.n_rows,
        kept=as_ranges([index.shard for index in kept]),
        first_shard=cache.n_planned,
        rows_per_shard=run.plan.rows_per_shard,
        rows=as_ranges([row for row in range(run.plan.n_rows) if row not in places]),
        found=_as_runs(places),
        created_by=run.created_by,
    )


def _places(cache: Manifest, kept: Sequence[ShardIndex], run: Manifest, keyed_rows: KeyedRows) -> dict[int, Place]:
    """Row of `run` -> where the cache has it. Rows of other files are known by key, skipped ones included."""
    places: dict[int, Place] = {}
    by_key: dict[str, Place] = {}
    for index in kept:
        source = cache.source(index.shard)
        rows, keys = index.table["row"].to_pylist(), index.table["key"].to_pylist()
        if _same_files(cache.datasets[source], run.dataset):
            places.update((row, (source, row)) for row in rows if row < run.plan.n_rows)
        else:
            for row, key in zip(rows, keys, strict=True):
                if key:
                    by_key.setdefault(key, (source, row))
    if by_key:
        for row, key in keyed_rows():
            if row < run.plan.n_rows and key is not None and key in by_key:
                places.setdefault(row, by_key[key])
    return places


def _same_files(first: DatasetIdentity, second: DatasetIdentity) -> bool:
    """Whether equal rows are the same rows. A manifest that names image roots has to name the same one; where none is
    named, that the images are the same is what the job checks on a few rows before it goes on."""
    return (first.fingerprint, first.image_root) == (second.fingerprint, second.image_root)


def _as_runs(places: dict[int, Place]) -> tuple[FoundRows, ...]:
    """Neighbouring rows that were found at neighbouring places are one entry."""
    runs: list[FoundRows] = []
    for row, (source, source_row) in sorted(places.items()):
        last = runs[-1] if runs else None
        follows = (last.row + last.count, last.source, last.source_row + last.count) if last else None
        if last and follows == (row, source, source_row):
            runs[-1] = last.model_copy(update={"count": last.count + 1})
        else:
            runs.append(FoundRows(row=row, source=source, source_row=source_row, count=1))
    return tuple(runs)
