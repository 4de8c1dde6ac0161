"""The index of a shard: one row per row of the plan. Its appearance commits the shard.

index/<n>.parquet has the columns of INDEX_SCHEMA (see `table`). The metadata of its schema holds, under b"emkd", an
envelope (see `digest`) of

    {"shard", "attempt", "settings_sha256", "objects": {name in the shard's folder: {n_bytes, sha256}},
     "rows_sha256": of the canonical JSON of all rows,
     "halvings": {row: times}, only if batches were halved because they did not fit into memory
     "logit_error": {mean_square, n_tokens}, only if the cache has codes}

so that the file has the hashes of its own rows (Parquet may read a flipped bit without an error), of every object of
the shard, and of the settings of its cache. It is created only if absent: of two attempts at a shard, the first to
commit wins, and the other attempt deletes its own folder. A shard without an index does not exist for readers.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from emkd.storage.objects.names import committed_shards, index_name, is_plain, shard_of_folder, shard_prefix

_METADATA_KEY = b"emkd"


@dataclass(frozen=True, kw_only=True)
class LogitError:
    """The measured error of logits that are read from codes.

    mean_square: of the error, over V logits and n_tokens tokens, with 6 significant digits
    """

    mean_square: float
    n_tokens: int

    @property
    def root(self) -> float:
        """Root mean square error of a logit."""
        return math.sqrt(self.mean_square)

    @classmethod
    def of(cls, mean_squares: Sequence[float]) -> "LogitError | None":
        """Return the error of some tokens from the mean square error of each; None if there are none."""
        n = len(mean_squares)
        return cls(mean_square=float(f"{math.fsum(mean_squares) / n:.6g}"), n_tokens=n) if n else None

    @classmethod
    def from_json(cls, value: Any) -> "LogitError":
        """Parse {mean_square, n_tokens}. Raises ValueError or TypeError for other values."""
        found = cls(**value)
        if not 0 <= float(found.mean_square) < math.inf or type(found.n_tokens) is not int or found.n_tokens < 1:
            raise ValueError(f"expected an error and a number of tokens, got {value!r:.80}")
        return found

    @classmethod
    def total(cls, parts: "Iterable[LogitError | None]") -> "LogitError | None":
        """Return the error of the tokens of all parts; None if there are none."""
        known = [part for part in parts if part is not None]
        n = sum(part.n_tokens for part in known)
        mean = math.fsum(part.mean_square * part.n_tokens for part in known) / max(1, n)
        return cls(mean_square=float(f"{mean:.6g}"), n_tokens=n) if n else None


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of one attempt at a shard.

    settings_sha256: hash of the manifest or the extension that planned the shard
    objects:         digest of each object, by its name in the attempt's folder
    table:           the rows, with INDEX_SCHEMA or an older schema
    halvings:        {row: how often its batch was halved}, of rows whose batch was
    logit_error:     of a few tokens of each row; None without codes
    """

    shard: int
    attempt: str
    settings_sha256: str
    objects: Mapping[str, ObjectDigest]
    table: pa.Table
    halvings: Mapping[int, int] = field(default_factory=dict)
    logit_error: LogitError | None = None

    @property
    def prefix(self) -> str:
        """The folder of the attempt."""
        return shard_prefix(self.shard, self.attempt)

    def to_bytes(self) -> bytes:
        """Return the content of index/<n>.parquet, a pure function of the fields."""
        body: dict[str, Any] = {
            "shard": self.shard,
            "attempt": self.attempt,
            "settings_sha256": self.settings_sha256,
            "objects": {name: digest.to_json() for name, digest in self.objects.items()},
            "rows_sha256": _rows_sha256(self.table),
        }
        if self.halvings:
            body["halvings"] = {str(row): times for row, times in self.halvings.items()}
        if self.logit_error is not None:
            body["logit_error"] = asdict(self.logit_error)
        return write_parquet(self.table, {_METADATA_KEY: canonical_json(seal_envelope(body))})

    @classmethod
    def from_bytes(cls, where: str, data: bytes, *, vouched: bool = False) -> "ShardIndex":
        """Parse and check index/<n>.parquet. Raises DamagedCacheError if anything in it is not as it was written.

        vouched: the bytes already match the seal's hash, so the rows' own hash is not compared
        """
        table = read_parquet(where, data)
        body = open_envelope(where, (table.schema.metadata or {}).get(_METADATA_KEY, b""))
        table = table.replace_schema_metadata(None)
        try:
            strange = [name for name in body["objects"] if not is_plain(name)]
            if strange:
                raise ValueError(f"{strange[0]!r:.80} is not the name of an object")
            index = cls(
                shard=int(body["shard"]),
                attempt=str(body["attempt"]),
                settings_sha256=str(body["settings_sha256"]),
                objects={name: ObjectDigest.from_json(value) for name, value in body["objects"].items()},
                table=table,
                halvings={int(row): int(times) for row, times in body.get("halvings", {}).items()},
                logit_error=LogitError.from_json(body["logit_error"]) if "logit_error" in body else None,
            )
            _ = index.prefix  # an attempt that can be part of a name
            intact = vouched or _rows_sha256(table) == body["rows_sha256"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, pa.ArrowException) as error:
            raise DamagedCacheError(f"{where}: not the index of a shard ({error}). {NEXT_STEP}") from error
        if not intact:
            raise DamagedCacheError(f"{where}: its rows do not match their own hash. {NEXT_STEP}")
        return index


def commit_shard(files: Files, index: ShardIndex) -> bool:
    """Commit a written attempt. Returns False if another attempt was first, and deletes the folder of this one.

    Committing the same attempt twice returns True both times. Raises DamagedCacheError if an object of the attempt is
    missing, or if the index that won cannot be read (then nothing is deleted), and CacheWriteError if the index cannot
    be written: then the shard is not committed, and the attempt is deleted.
    """
    changed = changed_sizes(files, index)
    # Sizes first: if the folder was deleted because another attempt won, that attempt's index exists by now.
    if changed and not files.exists(index_name(index.shard)):
        raise DamagedCacheError(
            f"{files.where(changed[0])}: missing or of another size than was written, so shard {index.shard} was not "
            "committed; run the same command again"
        )
    try:
        if files.create(index_name(index.shard), index.to_bytes()):
            return True
    except CacheWriteError:
        with contextlib.suppress(OSError):  # unusable files must not fill a disk
            if index.shard not in committed_shards(files):
                files.delete_tree(index.prefix)
        raise
    winner = read_index(files, index.shard)
    if winner.attempt == index.attempt:
        return True
    files.delete_tree(index.prefix)
    return False


def changed_sizes(files: Files, index: ShardIndex) -> list[str]:
    """Return the names of the shard's objects that are missing or have another size; reads no content."""
    sizes = files.sizes(index.prefix)
    names = {f"{index.prefix}/{name}": digest.n_bytes for name, digest in index.objects.items()}
    return [name for name, n_bytes in names.items() if sizes.get(name) != n_bytes]


def read_index(files: Files, shard: int, data: bytes | None = None, *, vouched: bool = False) -> ShardIndex:
    """Read and check the index of a committed shard.

    data:    the content of its file; read here by default
    vouched: see ShardIndex.from_bytes

    Raises DamagedCacheError if it is missing or not as it was written.
    """
    name = index_name(shard)
    data = files.read(name) if data is None else data
    if data is None:
        raise DamagedCacheError(f"{files.where(name)}: missing: shard {shard} is not committed. {NEXT_STEP}")
    index = ShardIndex.from_bytes(files.where(name), data, vouched=vouched)
    if index.shard != shard:
        raise DamagedCacheError(
            f"{files.where(name)}: is the index of shard {index.shard}, expected shard {shard}. {NEXT_STEP}"
        )
    return index


def missing_shards(files: Files, manifest: Manifest) -> list[int]:
    """Return the shards of a cache that are not committed, ascending: those that a resumed job has to write."""
    return sorted(set(manifest.shards) - set(committed_shards(files)))


def delete_lost_attempts(files: Files) -> list[str]:
    """Delete the folders of attempts that lost to a committed one, and partial files of objects that exist.

    Returns the names of what was deleted. An attempt at a shard that is not committed stays: another process may be
    writing it. Safe while other jobs run: an attempt that is deleted here could no longer win.
    """
    folders = files.folders("shards")
    deleted = [folder for folder in folders if folder.startswith("shards/.deleted-")]  # an interrupted deletion
    committed = set(committed_shards(files))
    attempts: dict[int, list[str]] = {}
    for folder in folders:
        shard = shard_of_folder(folder)
        if shard is not None and shard in committed:
            attempts.setdefault(shard, []).append(folder)
    for shard, rivals in attempts.items():
        if len(rivals) > 1:  # read an index only if it has to decide
            winner = read_index(files, shard).prefix
            deleted += [folder for folder in rivals if folder != winner]
    for folder in deleted:
        files.delete_tree(folder)
    return deleted + files.delete_partials()


def _rows_sha256(table: pa.Table) -> str:
    return sha256_hex(canonical_json(table.to_pylist()))
