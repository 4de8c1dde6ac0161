"""Caches of any number of samples, made without a teacher, with everything that opening and inspecting a cache reads.

The storage's own functions commit the shards. Rows of the index are as long and as varied as real rows, and one in
SKIPPED_EVERY is skipped. Each object of a shard exists under its name but is two bytes long, so no array is readable.
"""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.common.manifests import TOKENIZER, synthetic_manifest
from emkd.storage.arrays.layout import AXES
from emkd.storage.arrays.record_arrays import RecordArrays
from emkd.storage.cache import create_cache
from emkd.storage.index.commit import ShardIndex, commit_shard
from emkd.storage.index.table import INDEX_SCHEMA, OK, SKIPPED, TEXT_COLUMN, images_to_json
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.plan import DatasetFile
from emkd.storage.objects.digest import ObjectDigest
from emkd.storage.objects.local import LocalFiles
from emkd.storage.record import ImageSpan

ROWS_PER_SHARD = 250
SKIPPED_EVERY = 200
TILE, TILES = 24, 5  # five tiles of 24 x 24 vision tokens, as in LLaVA-NeXT
CONTENT = b"{}"


def make_manifest(n_samples: int) -> Manifest:
    files = (DatasetFile(name="train.parquet", n_rows=n_samples, n_bytes=1000 * n_samples),)
    return synthetic_manifest(n_samples, ROWS_PER_SHARD, top_k=64, vocabulary=32_000, lm_head_rows=32_064, files=files)


def index_row(row: int, shard: int, offsets: dict[str, int]) -> dict[str, Any]:
    """Return one row of INDEX_SCHEMA, a pure function of its number, and advance `offsets` by its counts."""
    rng = random.Random(row)
    skipped = row % SKIPPED_EVERY == SKIPPED_EVERY - 1
    n_text, n_vision, n_answer = rng.randint(40, 400), TILES * TILE * TILE, rng.randint(10, 200)
    counts = dict.fromkeys(AXES, 0)
    if not skipped:
        counts = {"text": n_text, "vision": n_vision, "affinity": n_text * n_vision, "answer": n_answer}
    size = (rng.randint(300, 1200), rng.randint(300, 1200))
    span = ImageSpan(text_position=3, start=0, count=n_vision, grids=((TILE, TILE),) * TILES, original_size=size)
    entry = {
        "row": row,
        "id": f"{row:012d}",
        "key": rng.randbytes(32).hex(),
        TEXT_COLUMN: rng.randbytes(32).hex(),
        "status": SKIPPED if skipped else OK,
        "reason": "too-long" if skipped else "",
        "detail": f"{rng.randint(4097, 9999)} tokens, --max-length is 4096" if skipped else "",
        "shard": shard,
        "images": [] if skipped else images_to_json([span], [offsets["vision"]]),
        "retained_mass": None if skipped else rng.betavariate(20, 2),
    }
    for axis in AXES:
        entry[f"{axis}_offset"], entry[f"{axis}_count"] = 0 if skipped else offsets[axis], counts[axis]
        offsets[axis] += counts[axis]
    return entry


def shard_index(manifest: Manifest, shard: int) -> ShardIndex:
    """Return the index of one shard."""
    offsets = dict.fromkeys(AXES, 0)
    rows = [index_row(row, shard, offsets) for row in manifest.rows(shard)]
    names = ["zarr.json"]
    for layout in RecordArrays.of(manifest).layouts:
        names += [f"{layout.name}/c/0" if layout.width is None else f"{layout.name}/c/0/0", f"{layout.name}/zarr.json"]
    return ShardIndex(
        shard=shard,
        attempt="scale",
        settings_sha256=manifest.shard_sha256(shard),
        objects={name: ObjectDigest.of(CONTENT) for name in sorted(names)},
        table=pa.Table.from_pylist(rows, schema=INDEX_SCHEMA),
    )


def make_unsealed(folder: Path, n_samples: int) -> LocalFiles:
    """Write a cache whose shards are all committed, without a seal."""
    manifest = make_manifest(n_samples)
    files: LocalFiles = create_cache(folder, manifest, TOKENIZER)
    for shard in manifest.shards:
        index = shard_index(manifest, shard)
        for name in index.objects:
            files.write(f"{index.prefix}/{name}", CONTENT)
        commit_shard(files, index)
    return files
