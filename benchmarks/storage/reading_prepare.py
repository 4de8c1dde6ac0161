"""The data that reading.py compares, and the environment of the other systems."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.environments import environment_with
from benchmarks.common.manifests import TOKENIZER, synthetic_manifest
from benchmarks.common.provenance import BUILD, ROOT
from benchmarks.common.synthetic_records import N_ANSWER, V, sample_rows, tile_pool
from benchmarks.storage.reading_forms import write_raw, write_small_chunks
from emkd.storage import CapturedRow, Manifest, commit_shard, create_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import FORMAT_VERSION, Compression
from emkd.storage.shards.writer import ShardWriter

K = 64
COMPRESSIONS: tuple[Compression, ...] = ("zstd", "lz4")
MDS_CODECS = ("same-zstd", "same-lz4", "zstd", "lz4", "whole")
# Make glibc's malloc keep freed memory. The second value is its maximum.
KEEPING = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}


def mds_environment() -> Path:
    """Return the Python of an environment with MDS and zarrs.

    streaming asks for older versions of NumPy and transformers, and works with ours.
    """
    return environment_with(Path(__file__).with_name("requirements-mds.txt"), BUILD / "mds")


def environment(kept: bool = False) -> dict[str, str]:
    """Return the environment variables of every process: this working tree, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (KEEPING if kept else {})


def write_caches(work: Path, n_shards: int, per_shard: int) -> Iterator[list[CapturedRow]]:
    """Write a sealed cache with each of COMPRESSIONS; yield the rows of each shard after they are committed."""
    files = {
        name: create_cache(work / f"emkd-{name}", manifest(n_shards, per_shard, name), TOKENIZER)
        for name in COMPRESSIONS
    }
    pool = tile_pool(K, per_shard * N_ANSWER, BUILD / f"pool-{K}-{per_shard}.npz")
    rows = sample_rows(pool, n_shards * per_shard, per_shard)
    for shard in range(n_shards):
        part = [next(rows) for _ in range(per_shard)]
        for name, cache in files.items():
            writer = ShardWriter(cache, shard, "a", manifest(n_shards, per_shard, name))
            for row in part:
                writer.add(row)
            commit_shard(cache, writer.finish())
        yield part
    for cache in files.values():
        seal(cache)


def prepare(work: Path, n_shards: int, per_shard: int) -> None:
    """Write all forms, or keep them if they are complete and have the same size and format version."""
    about = {"k": K, "shards": n_shards, "per_shard": per_shard, "format_version": FORMAT_VERSION}
    if (work / "complete").exists() and json.loads((work / "about.json").read_text()) == about:
        return
    work.mkdir(parents=True)  # fails if the folder holds something else
    (work / "about.json").write_text(json.dumps(about))
    for shard, rows in enumerate(write_caches(work, n_shards, per_shard)):
        raw = work / "raw" / f"{shard:03d}"
        write_raw(raw, (row.record for row in rows))
        write_small_chunks(work / "zarr-small" / raw.name, raw, K)
    script = ["-m", "benchmarks.storage.reading_forms", str(work), "--k", str(K), "--codecs", *MDS_CODECS]
    subprocess.run([str(mds_environment()), *script], check=True, env=environment(), cwd=ROOT)
    (work / "complete").touch()


def manifest(n_shards: int, per_shard: int, compression: Compression) -> Manifest:
    return synthetic_manifest(
        n_shards * per_shard, per_shard, top_k=K, vocabulary=V, compression=compression, batch_tokens=1
    )
