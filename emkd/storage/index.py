"""The index of a shard: one row per row of the plan. Its appearance is the commit.

index/<n>.parquet has the columns of INDEX_SCHEMA, and in its schema's metadata, under b"emkd", an envelope
(see `digest`) of

    {"shard", "attempt", "settings_sha256", "objects": {name in the shard's folder: {n_bytes, sha256}},
     "rows_sha256": of the canonical JSON of all rows}

so that the file vouches for its own rows (whatever Parquet makes of a flipped bit), for every object of the
shard, and for the settings of the cache that it belongs to. It is created only if absent: of two attempts
at a shard the first one wins, and the other one deletes its own folder. A shard without an index does not
exist for readers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.errors import DamagedCacheError
from emkd.storage.digest import (
    NEXT_STEP,
    ObjectDigest,
    canonical_json,
    open_envelope,
    seal_envelope,
    sha256_hex,
)
from emkd.storage.files import LocalFiles
from emkd.storage.manifest import ShardPlan
from emkd.storage.record import ImageSpan

OK = "ok"
SKIPPED = "skipped"

_METADATA_KEY = b"emkd"
_INDEX_NAME = re.compile(r"index/(\d{6,})\.parquet")
_ATTEMPT = re.compile(r"[A-Za-z0-9_.-]+")

IMAGE_TYPE = pa.struct(
    [
        ("text_position", pa.int32()),
        ("start", pa.int32()),
        ("count", pa.int32()),
        ("grids", pa.list_(pa.list_(pa.int32()))),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)

# Offsets and counts are in elements along the axis of the shard's arrays (see `layout`), 0 for skipped rows.
INDEX_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("shard", pa.int32()),
        ("text_offset", pa.int64()),
        ("text_count", pa.int64()),
        ("vision_offset", pa.int64()),
        ("vision_count", pa.int64()),
        ("affinity_offset", pa.int64()),
        ("affinity_count", pa.int64()),
        ("answer_offset", pa.int64()),
        ("answer_count", pa.int64()),
        ("images", pa.list_(IMAGE_TYPE)),
        ("retained_mass", pa.float64()),  # null without vision tokens
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of one attempt at a shard. `table` has INDEX_SCHEMA; `objects` is by name in the folder."""

    shard: int
    attempt: str
    settings_sha256: str
    objects: Mapping[str, ObjectDigest]
    table: pa.Table

    @property
    def prefix(self) -> str:
        return shard_prefix(self.shard, self.attempt)

    def to_bytes(self) -> bytes:
        """The content of index/<n>.parquet, a pure function of the fields."""
        body = {
            "shard": self.shard,
            "attempt": self.attempt,
            "settings_sha256": self.settings_sha256,
            "objects": {name: digest.to_json() for name, digest in self.objects.items()},
            "rows_sha256": _rows_sha256(self.table),
        }
        return write_parquet(self.table, {_METADATA_KEY: canonical_json(seal_envelope(body))})

    @classmethod
    def from_bytes(cls, where: str, data: bytes) -> "ShardIndex":
        """Read and check index/<n>.parquet. DamagedCacheError where anything in it is not as written."""
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
            )
            intact = _rows_sha256(table) == body["rows_sha256"]
        except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
            raise DamagedCacheError(f"{where}: not the index of a shard ({error}). {NEXT_STEP}") from error
        if not intact:
            raise DamagedCacheError(f"{where}: its rows do not match their own hash. {NEXT_STEP}")
        return index


def shard_prefix(shard: int, attempt: str) -> str:
    """The folder of one attempt at a shard. ValueError for an attempt that cannot be part of a name."""
    if not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"attempt {attempt!r}; expected letters, digits, '_', '.' and '-' only")
    return f"shards/{shard:06d}-{attempt}"


def index_name(shard: int) -> str:
    return f"index/{shard:06d}.parquet"


def commit_shard(files: LocalFiles, index: ShardIndex) -> bool:
    """Make a written shard exist. False where another attempt was first; its folder is then deleted here.

    Committing the same attempt twice is True both times. DamagedCacheError where an object of the attempt
    is not there, or where the index that won cannot be read (nothing is deleted then).
    """
    changed = changed_sizes(files, index)
    # In this order: a folder that was deleted because another attempt won has an index by now.
    if changed and not files.exists(index_name(index.shard)):
        raise DamagedCacheError(
            f"{files.where(changed[0])}: gone or of another size since it was written, so shard "
            f"{index.shard} was not committed; run the same command again"
        )
    if files.create(index_name(index.shard), index.to_bytes()):
        return True
    winner = read_index(files, index.shard)
    if winner.attempt == index.attempt:
        return True
    files.delete_tree(index.prefix)
    return False


def changed_sizes(files: LocalFiles, index: ShardIndex) -> list[str]:
    """Names of the shard's objects that are missing or have another size; their content is not read."""
    sizes = files.sizes(index.prefix)
    names = {f"{index.prefix}/{name}": digest.n_bytes for name, digest in index.objects.items()}
    return [name for name, n_bytes in names.items() if sizes.get(name) != n_bytes]


def read_index(files: LocalFiles, shard: int) -> ShardIndex:
    """The checked index of a committed shard. DamagedCacheError where it is missing or not as written."""
    name = index_name(shard)
    data = files.read(name)
    if data is None:
        raise DamagedCacheError(f"{files.where(name)}: missing: shard {shard} is not committed. {NEXT_STEP}")
    index = ShardIndex.from_bytes(files.where(name), data)
    if index.shard != shard:
        raise DamagedCacheError(f"{files.where(name)}: is the index of shard {index.shard}. {NEXT_STEP}")
    return index


def committed_shards(files: LocalFiles) -> list[int]:
    """Numbers of the shards that have an index, ascending. Reads no file."""
    matches = (_INDEX_NAME.fullmatch(name) for name in files.names("index"))
    return sorted(int(match[1]) for match in matches if match)


def missing_shards(files: LocalFiles, plan: ShardPlan) -> list[int]:
    """Numbers of the plan's shards that are not committed, ascending: what a resumed job has to do."""
    return sorted(set(range(plan.n_shards)) - set(committed_shards(files)))


def delete_lost_attempts(files: LocalFiles) -> list[str]:
    """Delete the folders of attempts at shards that another attempt has committed; their names.

    An attempt at a shard that is not committed stays: somebody may be writing it. Safe while others run: an
    attempt that is deleted here could not have won any more.
    """
    winners = {shard: read_index(files, shard).prefix for shard in committed_shards(files)}
    deleted = []
    for folder in files.folders("shards"):
        number = folder.removeprefix("shards/").partition("-")[0]
        lost = number.isdigit() and winners.get(int(number), folder) != folder
        if lost or folder.startswith("shards/.deleted-"):  # the latter: a deletion that was interrupted
            files.delete_tree(folder)
            deleted.append(folder)
    return deleted


def images_to_json(images: Sequence[ImageSpan]) -> list[dict[str, Any]]:
    """Image spans as a value of IMAGE_TYPE."""
    return [
        {
            "text_position": span.text_position,
            "start": span.start,
            "count": span.count,
            "grids": [list(grid) for grid in span.grids],
            "height": span.original_size[0],
            "width": span.original_size[1],
        }
        for span in images
    ]


def images_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[ImageSpan, ...]:
    """The inverse of images_to_json."""
    return tuple(
        ImageSpan(
            text_position=value["text_position"],
            start=value["start"],
            count=value["count"],
            grids=tuple((rows, columns) for rows, columns in value["grids"]),
            original_size=(value["height"], value["width"]),
        )
        for value in values
    )


def write_parquet(table: pa.Table, metadata: dict[bytes, bytes] | None = None) -> bytes:
    """A table of INDEX_SCHEMA as the bytes of a Parquet file: the same ones each time."""
    buffer = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata).combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(where: str, data: bytes) -> pa.Table:
    """The table in the bytes of a Parquet file; DamagedCacheError where it is not one of INDEX_SCHEMA."""
    try:
        table = pq.ParquetFile(BytesIO(data)).read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DamagedCacheError(
            f"{where}: not the Parquet file that was written ({error}). {NEXT_STEP}"
        ) from error
    if not table.schema.equals(INDEX_SCHEMA, check_metadata=False):
        raise DamagedCacheError(f"{where}: columns differ from those of an index. {NEXT_STEP}")
    return table


def _rows_sha256(table: pa.Table) -> str:
    return sha256_hex(canonical_json(table.to_pylist()))
