"""What rests on disk: the cache that the teacher's job writes and the student's run reads.

In reading order:

    record        one sample as the teacher saw it, in memory
    precision     how logits and affinity are rounded for the disk, and read back
    files         the operations on the place where a cache lies
    disk          what local disks are asked for underneath: syncs, whole writes, walks
    digest        SHA-256 of objects, and JSON that vouches for itself
    plan          which rows make which shard, of the first dataset and of those added later
    manifest      what a cache says of itself; who may share a cache
    described     the manifest and the plans of its extensions, read from disk
    create        the beginning of a cache: manifest and tokenizer, only if absent
    layout        the arrays of a shard: shapes, types, chunks, codecs
    rearrange     integers in an order that compresses well, and back
    encoding      from a record to what is stored of it, and back
    codec         chunks as bytes and back
    check         what must hold of rows before they are written
    index_rows    the rows of a shard's index, made while its records are written
    shard         writing: rows, one after the other -> one Zarr group and its index
    table         the rows of an index, in Arrow and Parquet
    index         one row per row of the plan; its appearance is the commit of a shard
    seal          the end of a job: totals, and the hash of everything
    integrity     reading: no byte is used that was not checked
    buffers       memory of shards that are not needed any more, for the next ones
    decode        a shard in memory, and records cut from it
    rows          the rows of all shards in memory, decoded as far as they are asked for
    find          from a key or an id to a sample
    verification  every byte read and checked
    extend        more rows for a cache
    repair        what is damaged leaves the cache
    cache         what readers use: open, find, read

    cache/
      manifest.json  tokenizer.json               before the first shard
      shards/000000-<attempt>/                    a Zarr v3 group, written once by one worker
      index/000000.parquet                        the commit of shard 0, and the hashes of its objects
      index.parquet  seal.json                    when every shard of the plan is committed
      extensions/000001/plan.json                 the first rows that were added; index.parquet, seal.json as above

The hashes form a small tree: seal.json vouches for itself and for the files beside it, each
index/<n>.parquet for itself and for the objects of its shard. The package imports neither torch nor
transformers nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emkd.storage.cache import Cache as Cache
    from emkd.storage.cache import SampleInfo as SampleInfo
    from emkd.storage.create import create_cache as create_cache
    from emkd.storage.index import commit_shard as commit_shard
    from emkd.storage.index import missing_shards as missing_shards
    from emkd.storage.manifest import Manifest as Manifest
    from emkd.storage.record import CapturedRow as CapturedRow
    from emkd.storage.record import ImageSpan as ImageSpan
    from emkd.storage.record import Record as Record
    from emkd.storage.record import RowHint as RowHint
    from emkd.storage.shard import write_shard as write_shard
    from emkd.storage.verification import Damage as Damage
    from emkd.storage.verification import verify as verify

# Loaded when first used: a record needs NumPy alone, Zarr and Arrow take half a second to import.
_HOMES = {
    "Cache": "cache",
    "CapturedRow": "record",
    "Damage": "verification",
    "ImageSpan": "record",
    "Manifest": "manifest",
    "Record": "record",
    "RowHint": "record",
    "SampleInfo": "cache",
    "commit_shard": "index",
    "create_cache": "create",
    "missing_shards": "index",
    "verify": "verification",
    "write_shard": "shard",
}

__all__ = [
    "Cache",
    "CapturedRow",
    "Damage",
    "ImageSpan",
    "Manifest",
    "Record",
    "RowHint",
    "SampleInfo",
    "commit_shard",
    "create_cache",
    "missing_shards",
    "verify",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'emkd.storage' has no attribute {name!r}")
    return getattr(import_module(f"emkd.storage.{_HOMES[name]}"), name)
