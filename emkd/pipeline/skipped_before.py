"""Rows that earlier runs of a job have skipped, and what becomes of them once their data are mended."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from emkd.pipeline.progress import log
from emkd.pipeline.skipped import SkipLimit, Skipped, SkippedRow
from emkd.samples.dataset import Dataset
from emkd.storage.index.columns import Rows
from emkd.storage.index.committed import read_committed
from emkd.storage.lifecycle.seal import read_seal
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import committed_shards, index_name

COLUMNS = ("row", "id", "reason", "detail", "shard", "key")


def count_table(limit: SkipLimit, manifest: Manifest, skipped: pa.Table) -> None:
    """Count skipped rows of an index, of one shard or of many."""
    for shard in pc.unique(skipped["shard"]).to_pylist():
        of_shard = skipped.filter(pc.equal(skipped["shard"], shard)).to_pylist()
        limit.add(manifest.source(shard), Skipped.of(map(_row, of_shard)))


def skipped_so_far(max_skipped: float, files: Files, manifest: Manifest) -> SkipLimit:
    """Return the limit of a job, with the rows that are skipped in the committed shards of its cache."""
    limit = SkipLimit.of(max_skipped, manifest)
    for _, skipped in _committed(files, manifest):
        count_table(limit, manifest, skipped)
    return limit


def again_if_mended(limit: SkipLimit, files: Files, manifest: Manifest, run: Manifest, dataset: Dataset) -> SkipLimit:
    """Return the limit without the rows of shards that are computed again, because skipped rows of them are mended.

    JSON names images by path: a user can replace a broken one without changing the dataset's own files. If the images
    of a skipped row have changed or can be read now, its shard is computed again: its index is deleted, as `--repair`
    does. A sealed cache stays as it is.
    """
    if read_seal(files) is not None:
        return limit
    mended: dict[int, int] = {}
    for shard, skipped in _committed(files, manifest):
        if manifest.datasets[manifest.source(shard)].fingerprint == run.dataset.fingerprint:
            n = sum(_is_mended(dataset, row["row"], row["key"]) for row in skipped.to_pylist())
            mended |= {shard: n} if n else {}
    if not mended:
        return limit
    log(
        f"{sum(mended.values())} rows that were skipped have changed since, so that {len(mended)} shards are computed "
        f"again ({_some(sorted(mended))})"
    )
    for shard in mended:
        files.delete(index_name(shard))
    return skipped_so_far(limit.max_skipped, files, manifest)


def _committed(files: Files, manifest: Manifest) -> list[tuple[int, pa.Table]]:
    """Return (shard, its skipped rows) of each committed shard that has any."""
    there = set(committed_shards(files))
    found = [
        (shard, Rows.of(read_committed(files, shard, manifest).table).skipped(COLUMNS))
        for shard in manifest.shards
        if shard in there
    ]
    return [(shard, skipped) for shard, skipped in found if len(skipped)]


def _is_mended(dataset: Dataset, row: int, key: str) -> bool:
    found = dataset.key(row)
    return found is not None and found != key


def _row(row: dict[str, object]) -> SkippedRow:
    return SkippedRow(row=int(str(row["row"])), id=str(row["id"]), reason=str(row["reason"]), detail=str(row["detail"]))


def _some(shards: Sequence[int], n: int = 8) -> str:
    return ", ".join(map(str, shards[:n])) + (", ..." if len(shards) > n else "")
