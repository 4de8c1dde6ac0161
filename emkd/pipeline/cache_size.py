"""How large a cache will be, from a few captured rows: they are written to a temporary folder and measured."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

from emkd.storage.index.commit import commit_shard
from emkd.storage.index.table import write_parquet
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.plan import ShardPlan
from emkd.storage.objects.open import open_files
from emkd.storage.record import CapturedRow
from emkd.storage.shards.writer import write_shard

# seal.json: an entry for each index (name, size, hash), and everything else.
SEAL_BYTES_PER_SHARD = 140
SEAL_BYTES = 1200


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of all files of a cache: n_rows * per_row + n_shards * per_shard + once."""

    per_row: float
    per_shard: float
    once: int


def measure_sizes(captured: Sequence[CapturedRow], manifest: Manifest, other_bytes: int, rows_per_shard: int) -> Sizes:
    """Measure the bytes that rows like the captured ones take.

    other_bytes: sizes of tokenizer.json and of the basis

    Small shards compress less than large ones, so the captured rows are written in shards of the job's own size if
    there are enough rows.
    """
    whole = len(captured) // rows_per_shard * rows_per_shard
    groups = [captured[start : start + rows_per_shard] for start in range(0, whole, rows_per_shard)] or [captured]
    shard_bytes = sum(_shard(group, manifest)[0] for group in groups)
    _, table_bytes = _shard(captured, manifest)
    empty_shard, empty_table = _shard([replace(captured[0], record=None, reason="none", detail="")], manifest)
    in_shards = (shard_bytes - len(groups) * empty_shard) / sum(map(len, groups))
    return Sizes(
        per_row=in_shards + (table_bytes - empty_table) / len(captured),
        per_shard=empty_shard + SEAL_BYTES_PER_SHARD,
        once=len(manifest.to_bytes()) + other_bytes + empty_table + SEAL_BYTES,
    )


def _shard(captured: Sequence[CapturedRow], manifest: Manifest) -> tuple[int, int]:
    """(bytes of a shard of these rows with its index, bytes of their rows in the consolidated index)"""
    rows = [replace(row, hint=replace(row.hint, row=number)) for number, row in enumerate(captured)]
    plan = ShardPlan.of(n_rows=len(rows), rows_per_shard=len(rows))
    alone = manifest.model_copy(update={"plan": plan, "extensions": ()})
    with tempfile.TemporaryDirectory(prefix="emkd-preflight-") as folder:
        files = open_files(folder)
        index = write_shard(files, 0, "preflight", rows, alone)
        commit_shard(files, index)
        return sum(files.sizes().values()), len(write_parquet(index.table))
