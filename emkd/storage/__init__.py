"""The cache on disk: the teacher's job writes it, the student's run reads it.

The modules and packages in reading order; each imports only from those above it:

    record      one sample as the teacher saw it, in memory
    precision   how logits and affinity are rounded for the disk, and read back
    objects/    whole byte strings by name: a local folder, hashes, checked reads
    manifest/   settings, plan and extensions of a cache
    basis       what turns hidden states into codes, and codes into logits
    arrays/     how each kind of array is laid out, encoded and decoded
    index/      one row per row of the plan; its appearance commits a shard
    shards/     encode records as a Zarr group, and read them back
    lifecycle/  create, seal, extend, verify, repair
    cache       the reader's interface: open, find, read

    cache/
      basis-<hash>.safetensors                    before the manifest, if the cache has codes
      manifest.json  tokenizer.json               before the first shard
      shards/000000-<attempt>/                    a Zarr v3 group, written once by one worker
      index/000000.parquet                        the commit of shard 0, and the hashes of its objects
      index.parquet  seal.json                    when every shard of the plan is committed
      extensions/000001/plan.json                 the first extension; it has its own index.parquet and seal.json

The hashes form a small tree: seal.json has its own hash and the hashes of the files next to it; each index/<n>.parquet
has its own hash and the hashes of its shard's objects. The package imports neither torch nor transformers nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emkd.storage.cache import Cache as Cache
    from emkd.storage.cache import SampleInfo as SampleInfo
    from emkd.storage.index.commit import commit_shard as commit_shard
    from emkd.storage.index.commit import missing_shards as missing_shards
    from emkd.storage.lifecycle.create import create_cache as create_cache
    from emkd.storage.lifecycle.verify import Damage as Damage
    from emkd.storage.lifecycle.verify import verify as verify
    from emkd.storage.manifest.manifest import Manifest as Manifest
    from emkd.storage.record import CapturedRow as CapturedRow
    from emkd.storage.record import ImageSpan as ImageSpan
    from emkd.storage.record import Record as Record
    from emkd.storage.record import RowHint as RowHint
    from emkd.storage.shards.writer import write_shard as write_shard

# Imported on first use: a record needs only NumPy, and Zarr and Arrow take half a second to import.
_HOMES = {
    "Cache": "cache",
    "CapturedRow": "record",
    "Damage": "lifecycle.verify",
    "ImageSpan": "record",
    "Manifest": "manifest.manifest",
    "Record": "record",
    "RowHint": "record",
    "SampleInfo": "cache",
    "commit_shard": "index.commit",
    "create_cache": "lifecycle.create",
    "missing_shards": "index.commit",
    "verify": "lifecycle.verify",
    "write_shard": "shards.writer",
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
