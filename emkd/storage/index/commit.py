"""The index of a shard: one row per row of the plan. Its appearance is the commit.

index/<n>.parquet has the columns of INDEX_SCHEMA (see `table`), and in its schema's metadata, under b"emkd",
an envelope (see `digest`) of

    {"shard", "attempt", "settings_sha256", "objects": {name in the shard's folder: {n_bytes, sha256}},
     "rows_sha256": of the canonical JSON of all rows,
     "halvings": {row: times}, only where batches were halved because they did not fit the memory}

so that the file vouches for its own rows (whatever Parquet makes of a flipped bit), for every object of the
shard, and for the settings of the cache that it belongs to. It is created only if absent: of two attempts
at a shard the first one wins, and the other one deletes its own folder. A shard without an index does not
exist for readers.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from emkd.errors import CacheWriteError, DamagedCacheError
from emkd.storage.index.table import read_parquet, write_parquet
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.digest import (
    NEXT_STEP,
    ObjectDigest,
    canonical_json,
    open_envelope,
    seal_envelope,
    sha256_hex,
)
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import committed_shards, index_name, shard_of_folder, shard_prefix

_METADATA_KEY = b"emkd"


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of one attempt at a shard. `table` has INDEX_SCHEMA; `objects` is by name in the folder;
    `halvings` says how often the batch of a row was halved, of those that were."""

    shard: int
    attempt: str
    settings_sha256: str
    objects: Mapping[str, ObjectDigest]
    table: pa.Table
    halvings: Mapping[int, int] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return shard_prefix(self.shard, self.attempt)

    def to_bytes(self) -> bytes:
        """The content of index/<n>.parquet, a pure function of the fields."""
        body: dict[str, Any] = {
            "shard": self.shard,
            "attempt": self.attempt,
            "settings_sha256": self.settings_sha256,
            "objects": {name: digest.to_json() for name, digest in self.objects.items()},
            "rows_sha256": _rows_sha256(self.table),
        }
        if self.halvings:
            body["halvings"] = {str(row): times for row, times in self.halvings.items()}
        return write_parquet(self.table, {_METADATA_KEY: canonical_json(seal_envelope(body))})

    @classmethod
    def from_bytes(cls, where: str, data: bytes, *, vouched: bool = False) -> "ShardIndex":
        """Read and check index/<n>.parquet. DamagedCacheError where anything in it is not as written.

        vouched: the seal's hash of these bytes was compared already; the rows' own hash would say nothing more
        """
        table = read_parquet(where, data)
        body = open_envelope(where, (table.schema.metadata or {}).get(_METADATA_KEY, b""))
        table = table.replace_schema_metadata(None)
        try:
            index = cls(
                shard=int(body["shard"]),
                attempt=str(body["attempt"]),
                settings_sha256=str(body["settings_sha256"]),
                objects={name: ObjectDigest.from_json(value) for name, value in body["objects"].items()},
                table=table,
                halvings={int(row): int(times) for row, times in body.get("halvings", {}).items()},
            )
            intact = vouched or _rows_sha256(table) == body["rows_sha256"]
        except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
            raise DamagedCacheError(f"{where}: not the index of a shard ({error}). {NEXT_STEP}") from error
        if not intact:
            raise DamagedCacheError(f"{where}: its rows do not match their own hash. {NEXT_STEP}")
        return index


def commit_shard(files: Files, index: ShardIndex) -> bool:
    """Make a written shard exist. False where another attempt was first; its folder is then deleted here.

    Committing the same attempt twice is True both times. DamagedCacheError where an object of the attempt
    is not there, or where the index that won cannot be read (nothing is deleted then); CacheWriteError where the
    index cannot be written: the shard is not committed then, and the attempt is deleted.
    """
    changed = changed_sizes(files, index)
    # In this order: a folder that was deleted because another attempt won has an index by now.
    if changed and not files.exists(index_name(index.shard)):
        raise DamagedCacheError(
            f"{files.where(changed[0])}: gone or of another size since it was written, so shard "
            f"{index.shard} was not committed; run the same command again"
        )
    try:
        if files.create(index_name(index.shard), index.to_bytes()):
            return True
    except CacheWriteError:
        with contextlib.suppress(OSError):  # a full disk: what is of no use must not fill it
            if index.shard not in committed_shards(files):
                files.delete_tree(index.prefix)
        raise
    winner = read_index(files, index.shard)
    if winner.attempt == index.attempt:
        return True
    files.delete_tree(index.prefix)
    return False


def changed_sizes(files: Files, index: ShardIndex) -> list[str]:
    """Names of the shard's objects that are missing or have another size; their content is not read."""
    sizes = files.sizes(index.prefix)
    names = {f"{index.prefix}/{name}": digest.n_bytes for name, digest in index.objects.items()}
    return [name for name, n_bytes in names.items() if sizes.get(name) != n_bytes]


def read_index(files: Files, shard: int, data: bytes | None = None, *, vouched: bool = False) -> ShardIndex:
    """The checked index of a committed shard, from the file or from its `data` where they were read already.
    vouched: see ShardIndex.from_bytes

    DamagedCacheError where it is missing or not as written.
    """
    name = index_name(shard)
    data = files.read(name) if data is None else data
    if data is None:
        raise DamagedCacheError(f"{files.where(name)}: missing: shard {shard} is not committed. {NEXT_STEP}")
    index = ShardIndex.from_bytes(files.where(name), data, vouched=vouched)
    if index.shard != shard:
        raise DamagedCacheError(f"{files.where(name)}: is the index of shard {index.shard}. {NEXT_STEP}")
    return index


def missing_shards(files: Files, manifest: Manifest) -> list[int]:
    """Numbers of the shards of a cache that are not committed, ascending: what a resumed job has to do."""
    return sorted(set(manifest.shards) - set(committed_shards(files)))


def delete_lost_attempts(files: Files) -> list[str]:
    """Delete the folders of attempts at shards that another attempt has committed, and partial files of objects
    that exist; their names.

    An attempt at a shard that is not committed stays: somebody may be writing it. Safe while others run: an
    attempt that is deleted here could not have won any more.
    """
    folders = files.folders("shards")
    deleted = [folder for folder in folders if folder.startswith("shards/.deleted-")]  # was interrupted
    committed = set(committed_shards(files))
    attempts: dict[int, list[str]] = {}
    for folder in folders:
        shard = shard_of_folder(folder)
        if shard is not None and shard in committed:
            attempts.setdefault(shard, []).append(folder)
    for shard, rivals in attempts.items():
        if len(rivals) > 1:  # so that an index is read only where there is a choice
            winner = read_index(files, shard).prefix
            deleted += [folder for folder in rivals if folder != winner]
    for folder in deleted:
        files.delete_tree(folder)
    return deleted + files.delete_partials()


def _rows_sha256(table: pa.Table) -> str:
    return sha256_hex(canonical_json(table.to_pylist()))
