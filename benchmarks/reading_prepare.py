"""Writes what reading.py compares, and the environment of its rivals: see there."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from reading_data import write_raw, write_small_chunks
from synthetic_records import N_ANSWER, V, sample_rows, tile_pool

from emkd.storage import Manifest, commit_shard, create_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import FORMAT_VERSION, ImageProcessorIdentity, TeacherIdentity, TokenizerIdentity
from emkd.storage.manifest.plan import DatasetFile, DatasetIdentity, ShardPlan
from emkd.storage.objects.digest import sha256_hex
from emkd.storage.shards.writer import ShardWriter

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"
TOKENIZER = b"{}"
K = 64
COMPRESSIONS = ("zstd", "lz4")
MDS_CODECS = ("same-zstd", "same-lz4", "zstd", "lz4", "whole")
# glibc's malloc: keep what is freed. The second is its maximum.
KEEPING = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}


def mds_environment(folder: Path = BUILD / "mds") -> Path:
    """The Python of an environment with MDS and zarrs, made if it is not there. What it has of ours comes from the
    environment that runs this: streaming asks for older versions of NumPy and transformers, and works with these."""
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ours = folder / "lib" / version / "site-packages" / "ours.pth"
        ours.write_text(sysconfig.get_path("purelib") + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "-r", str(HERE / "requirements-mds.txt")], check=True)
        (folder / ".ready").touch()
    return python


def environment(kept: bool = False) -> dict[str, str]:
    """Of every process: this working tree, one thread."""
    return os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"} | (KEEPING if kept else {})


def prepare(work: Path, n_shards: int, per_shard: int) -> None:
    """Write all forms; what is complete already is kept if it has as many samples and is of the present format."""
    about = {"k": K, "shards": n_shards, "per_shard": per_shard, "format_version": FORMAT_VERSION}
    if (work / "complete").exists() and json.loads((work / "about.json").read_text()) == about:
        return
    work.mkdir(parents=True)  # an error where there is something else
    (work / "about.json").write_text(json.dumps(about))
    pool = tile_pool(K, per_shard * N_ANSWER, BUILD / f"pool-{K}-{per_shard}.npz")
    files = {
        name: create_cache(work / f"emkd-{name}", manifest(n_shards, per_shard, name), TOKENIZER)
        for name in COMPRESSIONS
    }
    rows = sample_rows(pool, n_shards * per_shard, per_shard)
    for shard in range(n_shards):
        part = [next(rows) for _ in range(per_shard)]
        for name, place in files.items():
            writer = ShardWriter(place, shard, "a", manifest(n_shards, per_shard, name))
            for row in part:
                writer.add(row)
            commit_shard(place, writer.finish())
        raw = work / "raw" / f"{shard:03d}"
        write_raw(raw, (row.record for row in part))
        write_small_chunks(work / "zarr-small" / raw.name, raw, K)
    for place in files.values():
        seal(place)
    script = [str(HERE / "reading_data.py"), str(work), "--k", str(K), "--codecs", *MDS_CODECS]
    subprocess.run([str(mds_environment()), *script], check=True, env=environment())
    (work / "complete").touch()


def manifest(n_shards: int, per_shard: int, compression: Any) -> Manifest:
    n = n_shards * per_shard
    return Manifest(
        teacher=TeacherIdentity(name="synthetic", weights_sha256="0" * 64, dtype="float32", architecture="llava"),
        image_processor=ImageProcessorIdentity(class_name="None", sha256="0" * 64, settings={}),
        tokenizer=TokenizerIdentity(sha256=sha256_hex(TOKENIZER), n_tokens=V, lm_head_rows=V),
        top_k=K,
        answer_top_k=K,
        compression=compression,
        batch_tokens=1,
        dataset=DatasetIdentity(
            fingerprint="0" * 64, n_rows=n, files=(DatasetFile(name="synthetic", n_rows=n, n_bytes=0),)
        ),
        plan=ShardPlan.of(n_rows=n, rows_per_shard=per_shard),
    )
