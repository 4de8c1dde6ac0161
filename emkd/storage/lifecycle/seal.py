"""The end of a job: totals, and the hash of everything.

seal.json is an envelope (see `digest`) around Seal. It vouches for manifest.json, tokenizer.json,
index.parquet (all rows of all shards in plan order) and every index/<n>.parquet; those vouch for the
objects of their shards, so that the seal stays small and one small read opens a cache of any size. It is
created only if absent, and its bytes are a pure function of what is committed: two that seal at once agree.
A cache with extensions has a seal and a table for each (see `described`), and the newest one counts.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from emkd.errors import CacheConflictError, CacheIncompleteError, DamagedCacheError
from emkd.storage.arrays.record_arrays import RecordArrays
from emkd.storage.index.commit import ShardIndex, changed_sizes, missing_shards, read_index
from emkd.storage.index.table import (
    INDEX_SCHEMA,
    OK,
    TEXT_COLUMN,
    n_stored_vision,
    read_parquet,
    with_texts,
    write_parquet,
)
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import count_extensions, described_names, read_manifest
from emkd.storage.objects.digest import NEXT_STEP, ObjectDigest, checked, open_envelope, seal_envelope, sha256_hex
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import MANIFEST_NAME, TOKENIZER_NAME, index_name, seal_name, table_name


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SealedObject(_Stored):
    n_bytes: int
    sha256: str

    @property
    def digest(self) -> ObjectDigest:
        return ObjectDigest(n_bytes=self.n_bytes, sha256=self.sha256)


class Totals(_Stored):
    """Tokens of all samples, and stored bytes of the shards by array ("group": what describes the arrays).

    stored_vision_tokens: those of images that samples share counted once; None in format version 1, which has no such
    """

    vision_tokens: int
    stored_vision_tokens: int | None = None
    text_tokens: int
    answer_tokens: int
    n_bytes: dict[str, int]


class Seal(_Stored):
    """The body of seal.json. n_samples + n_skipped are the rows of the plan."""

    n_samples: int
    n_skipped: int
    n_shards: int
    totals: Totals
    objects: dict[str, SealedObject]

    def check(self, files: Files, name: str) -> bytes:
        """The bytes of an object that the seal vouches for; DamagedCacheError where they are not those."""
        if name not in self.objects:
            raise DamagedCacheError(f"{files.where(name)}: not in the seal. {NEXT_STEP}")
        return checked(files.where(name), files.read(name), self.objects[name].digest)


def seal(files: Files, committed: "Committed | None" = None) -> Seal:
    """Seal a cache whose shards are all committed, durably.

    committed: what `read_indexes` found just now, sizes checked; read here where it is not that of all shards

    Sealing a sealed cache returns its seal. InputNotFoundError where there is no cache,
    CacheIncompleteError where shards are missing, DamagedCacheError where an index cannot be read or an
    object of a shard is gone or of another size (contents are not read: see `verify`).
    """
    found, manifest = read_seal(files), read_manifest(files)
    if found is not None:
        files.sync_names([seal_name(len(manifest.extensions))])  # who wrote it may have been killed before it did
        return found
    missing = missing_shards(files, manifest)
    if missing:
        raise CacheIncompleteError(
            f"{files.root}: {len(missing)} of {len(manifest.shards)} shards are missing (the first is {missing[0]}, of "
            f"{_data_names(manifest, missing[0])}); run cache-teacher again with that data: it does only those"
        )
    if committed is None or list(committed.indexes) != [index_name(shard) for shard in manifest.shards]:
        committed = read_indexes(files, manifest, manifest.shards, check_sizes=True)
    check_tokenizer(files, manifest)
    _create_table(files, manifest, committed.table)
    body = _summary(files, manifest, committed)
    envelope = seal_envelope(body.model_dump(mode="json", exclude_none=True))
    text = json.dumps(envelope, indent=2, sort_keys=True, ensure_ascii=False)
    number = len(manifest.extensions)
    files.sync_names(body.objects)
    files.create(seal_name(number), text.encode() + b"\n")
    if read_seal(files, number) != body:
        raise CacheConflictError(
            f"{files.where(seal_name(number))}: another run sealed the cache at the same time with other content; "
            "run `emkd inspect URI --verify`"
        )
    return body


def read_seal(files: Files, extension: int | None = None) -> Seal | None:
    """The seal of a cache, or of its state with so many extensions; None where it is not sealed;
    DamagedCacheError where the seal does not match its own hash.

    A seal of a newer format, whose body is another one, is a CacheVersionError if its manifest is intact.
    """
    name = seal_name(count_extensions(files) if extension is None else extension)
    data = files.read(name)
    if data is None:
        return None
    where = files.where(name)
    body = open_envelope(where, data)
    try:
        return Seal.model_validate(body)
    except ValidationError as error:
        Manifest.from_bytes(files.read(MANIFEST_NAME) or b"", files.where(MANIFEST_NAME))
        raise DamagedCacheError(f"{where}: not the seal of a cache: {error}. {NEXT_STEP}") from error


def read_committed(
    files: Files, shard: int, manifest: Manifest, data: bytes | None = None, *, vouched: bool = False
) -> ShardIndex:
    """As read_index, of an index that is checked to be this cache's own; DamagedCacheError where it is not."""
    index, where = read_index(files, shard, data, vouched=vouched), files.where(index_name(shard))
    if index.settings_sha256 != manifest.shard_sha256(shard):
        plan = files.where(described_names(manifest)[manifest.source(shard)])
        raise DamagedCacheError(
            f"{where}: written under another manifest or plan than {plan}: one of the two is another cache's or was "
            f"changed. {NEXT_STEP}"
        )
    if index.table["row"].to_pylist() != list(manifest.rows(shard)):
        raise DamagedCacheError(f"{where}: its rows are not those of the plan. {NEXT_STEP}")
    return index


def check_tokenizer(files: Files, manifest: Manifest) -> bytes:
    """The bytes of tokenizer.json, which the manifest vouches for; DamagedCacheError where they are not those."""
    where, data = files.where(TOKENIZER_NAME), files.read(TOKENIZER_NAME)
    if data is None:
        raise DamagedCacheError(f"{where}: missing. {NEXT_STEP}")
    if sha256_hex(data) != manifest.tokenizer.sha256:
        raise DamagedCacheError(f"{where}: content changed, it is not the tokenizer of the manifest. {NEXT_STEP}")
    return data


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What some committed shards have together: their rows in plan order, totals, and size and hash of each index."""

    table: pa.Table
    totals: Totals
    indexes: dict[str, SealedObject]


def read_indexes(files: Files, manifest: Manifest, shards: Sequence[int], *, check_sizes: bool = False) -> Committed:
    """Read and check the indexes of committed shards, each of them once: of a shard nothing is kept but its rows and
    sums. With `check_sizes`, each of its objects has to be there in its size. DamagedCacheError."""
    tables: list[pa.Table] = []
    n_bytes = Counter({name: 0 for name in ("group", *(layout.name for layout in RecordArrays.of(manifest).layouts))})
    indexes: dict[str, SealedObject] = {}
    stored = 0
    for shard in shards:
        name = index_name(shard)
        data = _whole(files, name)
        index = read_committed(files, shard, manifest, data)
        if check_sizes:
            _check_sizes(files, index)
        stored += n_stored_vision(index.table)
        tables.append(index.table)
        indexes[name] = _sealed(data)
        for part, size in _parts(index):
            n_bytes[part] += size
    table = _merged(tables).combine_chunks()
    counts = {f"{axis}_tokens": pc.sum(table[f"{axis}_count"]).as_py() or 0 for axis in ("vision", "text", "answer")}
    vision = None if manifest.format_version == 1 else stored
    totals = Totals(**counts, stored_vision_tokens=vision, n_bytes=dict(n_bytes))
    return Committed(table=table, totals=totals, indexes=indexes)


def _merged(tables: list[pa.Table]) -> pa.Table:
    """The rows of all indexes, in their order. Those of an older version make the table that it would have made."""
    if any(TEXT_COLUMN in table.column_names for table in tables):
        tables = list(map(with_texts, tables))
    return pa.concat_tables(tables or [INDEX_SCHEMA.empty_table()])


def _parts(index: ShardIndex) -> Iterator[tuple[str, int]]:
    """(array, stored bytes) of every object of a shard; what belongs to no array is "group"."""
    for name, digest in index.objects.items():
        yield (name.partition("/")[0] if "/" in name else "group", digest.n_bytes)


def _check_sizes(files: Files, index: ShardIndex) -> None:
    changed = changed_sizes(files, index)
    if changed:
        raise DamagedCacheError(f"{files.where(changed[0])}: gone or of another size. {NEXT_STEP}")


def _create_table(files: Files, manifest: Manifest, table: pa.Table) -> None:
    """Write the consolidated index, unless one of the same rows is there already."""
    name = table_name(len(manifest.extensions))
    data = write_parquet(table)
    if files.create(name, data):
        return
    where, existing = files.where(name), files.read(name) or b""
    if existing != data and not read_parquet(where, existing).equals(table):
        raise DamagedCacheError(
            f"{where}: left by an earlier run and not the rows of the committed shards. Run the same cache-teacher "
            "command again with --repair: it is made anew from index/*.parquet"
        )


def _summary(files: Files, manifest: Manifest, committed: Committed) -> Seal:
    """The seal vouches for the indexes as they were read and checked, and for what describes them."""
    table = committed.table
    n_samples = pc.sum(pc.equal(table["status"], OK)).as_py() or 0
    names = (*described_names(manifest), TOKENIZER_NAME, table_name(len(manifest.extensions)))
    objects = {name: _sealed(_whole(files, name)) for name in names} | committed.indexes
    return Seal(
        n_samples=n_samples,
        n_skipped=len(table) - n_samples,
        n_shards=len(committed.indexes),
        totals=committed.totals,
        objects=dict(sorted(objects.items())),
    )


def _whole(files: Files, name: str) -> bytes:
    data = files.read(name)
    if data is None:
        raise DamagedCacheError(f"{files.where(name)}: missing. {NEXT_STEP}")
    return data


def _sealed(data: bytes) -> SealedObject:
    return SealedObject(n_bytes=len(data), sha256=ObjectDigest.of(data).sha256)


def _data_names(manifest: Manifest, shard: int) -> str:
    return ", ".join(file.name for file in manifest.datasets[manifest.source(shard)].files)
