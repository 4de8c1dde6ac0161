"""The indexes of committed shards, checked to be this cache's own, and their totals."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from emkd.errors import DamagedCacheError
from emkd.storage.arrays.layout import IndexedAxis
from emkd.storage.arrays.record_arrays import RecordArrays
from emkd.storage.index.check_rows import check_rows
from emkd.storage.index.commit import LogitError, ShardIndex, changed_sizes, read_index
from emkd.storage.index.table import INDEX_SCHEMA, TEXT_COLUMN, count_column, n_stored_vision, with_texts
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.plan import Count, Stored
from emkd.storage.manifest.read import manifest_files
from emkd.storage.objects.checked import read_existing
from emkd.storage.objects.digest import NEXT_STEP, ObjectDigest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import index_name


class Totals(Stored):
    """Tokens of all samples, and stored bytes of the shards by array ("group": metadata that belongs to no array).

    stored_vision_tokens: vision tokens, with those of an image that samples share counted once; None in format
                          version 1, which does not share images
    logit_error:          measured root mean square error of logits read from codes; None without codes
    """

    vision_tokens: Count
    stored_vision_tokens: Count | None = None
    text_tokens: Count
    answer_tokens: Count
    n_bytes: dict[str, Count]
    logit_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Several committed shards together.

    table:   their rows in plan order
    digests: size and hash of each index, by name
    """

    table: pa.Table
    totals: Totals
    digests: dict[str, ObjectDigest]


def read_committed(
    files: Files, shard: int, manifest: Manifest, data: bytes | None = None, *, vouched: bool = False
) -> ShardIndex:
    """Read the index of a committed shard, as read_index, and check that it belongs to this cache.

    Raises DamagedCacheError as read_index does, and if the index was written under another manifest or plan or has
    other rows than the plan.
    """
    index, where = read_index(files, shard, data, vouched=vouched), files.where(index_name(shard))
    if shard not in manifest.shards:
        raise DamagedCacheError(f"{where}: no plan has shard {shard}. {NEXT_STEP}")
    if index.settings_sha256 != manifest.shard_sha256(shard):
        plan = files.where(manifest_files(manifest)[manifest.source(shard)])
        raise DamagedCacheError(
            f"{where}: written under a manifest or plan other than {plan}: one of the two belongs to another cache or "
            f"was changed. {NEXT_STEP}"
        )
    same_number = len(index.table) == manifest.n_rows_of(shard)
    if not same_number or index.table["row"].to_pylist() != list(manifest.rows(shard)):
        raise DamagedCacheError(f"{where}: its rows are not the rows of the plan. {NEXT_STEP}")
    check_rows(where, index.table, shard, manifest)
    return index


def read_indexes(files: Files, manifest: Manifest, shards: Sequence[int], *, check_sizes: bool = False) -> Committed:
    """Read and check the indexes of committed shards, each once. Only the rows and sums of a shard stay in memory.

    check_sizes: also check that each object of the shards exists and has its size; contents are not read

    Raises DamagedCacheError, which names the object.
    """
    tables: list[pa.Table] = []
    n_bytes = Counter({name: 0 for name in ("group", *(layout.name for layout in RecordArrays.of(manifest).layouts))})
    digests: dict[str, ObjectDigest] = {}
    stored_vision_tokens = 0
    errors: list[LogitError | None] = []
    for shard in shards:
        name = index_name(shard)
        data = read_existing(files, name)
        index = read_committed(files, shard, manifest, data)
        if check_sizes:
            _check_sizes(files, index)
        stored_vision_tokens += n_stored_vision(index.table)
        tables.append(index.table)
        errors.append(index.logit_error)
        digests[name] = ObjectDigest.of(data)
        for array, size in _stored_bytes(index):
            n_bytes[array] += size
    table, error = _merged(tables).combine_chunks(), LogitError.total(errors)
    totals = Totals(
        vision_tokens=_n_tokens(table, "vision"),
        stored_vision_tokens=None if manifest.format_version == 1 else stored_vision_tokens,
        text_tokens=_n_tokens(table, "text"),
        answer_tokens=_n_tokens(table, "answer"),
        n_bytes=dict(n_bytes),
        logit_error=None if error is None else float(f"{error.root:.6g}"),
    )
    return Committed(table=table, totals=totals, digests=digests)


def _merged(tables: list[pa.Table]) -> pa.Table:
    """Concatenate the rows of all indexes. Indexes of an older version make the table that it would have made."""
    if any(TEXT_COLUMN in table.column_names for table in tables):
        tables = list(map(with_texts, tables))
    return pa.concat_tables(tables or [INDEX_SCHEMA.empty_table()])


def _n_tokens(table: pa.Table, axis: IndexedAxis) -> int:
    """Return the number of tokens of all samples along an axis."""
    return pc.sum(table[count_column(axis)]).as_py() or 0


def _stored_bytes(index: ShardIndex) -> Iterator[tuple[str, int]]:
    """Yield (array, bytes) of every object of a shard; the array is "group" if the object belongs to none."""
    for name, digest in index.objects.items():
        yield (name.partition("/")[0] if "/" in name else "group", digest.n_bytes)


def _check_sizes(files: Files, index: ShardIndex) -> None:
    changed = changed_sizes(files, index)
    if changed:
        raise DamagedCacheError(f"{files.where(changed[0])}: missing or of another size. {NEXT_STEP}")
