"""How large a cache will be, from a few captured rows: they are really written, into a folder that is thrown away."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

from emkd.storage.files import open_files
from emkd.storage.index import commit_shard
from emkd.storage.manifest import Manifest
from emkd.storage.plan import ShardPlan
from emkd.storage.record import CapturedRow
from emkd.storage.shard import write_shard
from emkd.storage.table import write_parquet

# An entry of seal.json: name, size and hash of an index.
SEAL_BYTES_PER_SHARD = 140


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of all files of a cache: n_rows * per_row + n_shards * per_shard + once."""

    per_row: float
    per_shard: float
    once: int


def measure(captured: Sequence[CapturedRow], manifest: Manifest, tokenizer_bytes: int) -> Sizes:
    """What rows like the captured ones take. `tokenizer_bytes` is the size of tokenizer.json."""
    shard, table = _written(captured, manifest)
    empty_shard, empty_table = _written([replace(captured[0], record=None, reason="none", detail="")], manifest)
    return Sizes(
        per_row=(shard - empty_shard + table - empty_table) / len(captured),
        per_shard=empty_shard + SEAL_BYTES_PER_SHARD,
        once=len(manifest.to_bytes()) + tokenizer_bytes + empty_table,
    )


def _written(captured: Sequence[CapturedRow], manifest: Manifest) -> tuple[int, int]:
    """Bytes of a shard of these rows, its index included, and of their rows in the consolidated index."""
    rows = [replace(row, hint=replace(row.hint, row=place)) for place, row in enumerate(captured)]
    plan = ShardPlan.of(n_rows=len(rows), rows_per_shard=len(rows))
    alone = manifest.model_copy(update={"plan": plan, "extensions": ()})
    with tempfile.TemporaryDirectory(prefix="emkd-preflight-") as folder:
        files = open_files(folder)
        index = write_shard(files, 0, "preflight", rows, alone)
        commit_shard(files, index)
        return sum(files.sizes().values()), len(write_parquet(index.table))
