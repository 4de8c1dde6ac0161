"""CPU time of encoding and writing a sample; capture_overhead.py describes the sample."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common.manifests import TOKENIZER, synthetic_manifest
from benchmarks.common.synthetic_logits import SCALE, Synthetic, lm_head, sharpness, text_states, vision_states
from emkd.storage.index.commit import ShardIndex
from emkd.storage.lifecycle.create import create_cache
from emkd.storage.objects.digest import sha256_hex
from emkd.storage.objects.local import LocalFiles
from emkd.storage.record import CapturedRow, ImageSpan, Record, RowHint
from emkd.storage.shards.writer import write_shard
from emkd.vlm.affinity import affinity
from emkd.vlm.head import LMHead

VOCABULARY = 151_936
GRID = (54, 54)
N_TEXT, N_ANSWER = 200, 60
K = 64
D = 256
SAMPLES = 8
ROUNDS = 5


def encode_ms() -> dict[str, Any]:
    """Return milliseconds of CPU time for a sample: medians over ROUNDS shards, and raw repeats."""
    head = lm_head(VOCABULARY, D, np.random.default_rng(0))
    rows = [_row(number, head) for number in range(SAMPLES)]
    manifest = synthetic_manifest(SAMPLES, SAMPLES, top_k=K, vocabulary=VOCABULARY)
    with tempfile.TemporaryDirectory(prefix="emkd-encode-") as scratch:
        files = create_cache(Path(scratch) / "cache", manifest, TOKENIZER)
        found: dict[str, list[float]] = {"all": [], "disk": []}
        for number in range(ROUNDS + 1):
            began = time.process_time()
            index = write_shard(files, 0, f"attempt{number}", rows, manifest)
            between = time.process_time()
            _write_again(files, index, f"again{number}")
            if number:
                found["all"].append((between - began) * 1000 / SAMPLES)
                found["disk"].append((time.process_time() - between) * 1000 / SAMPLES)
    n_bytes = sum(digest.n_bytes for digest in index.objects.values())
    return {
        "encode_ms": median(found["all"]),
        "encode": {
            "median_ms": {part: median(runs) for part, runs in found.items()},
            "runs_ms": found,
            "samples": SAMPLES,
            "bytes_per_vision_token": n_bytes / SAMPLES / (GRID[0] * GRID[1]),
        },
    }


def _write_again(files: LocalFiles, index: ShardIndex, folder: str) -> None:
    """Write as many bytes to as many files."""
    for number, digest in enumerate(index.objects.values()):
        files.write(f"{folder}/{number}", b"0" * digest.n_bytes)
    files.sync_tree(folder)


def _row(number: int, head: LMHead) -> CapturedRow:
    """Return one sample with one image of the synthetic teacher."""
    rng = np.random.default_rng(100 + number)
    hidden = vision_states(GRID, D, rng) * sharpness(GRID, rng) * SCALE / D**0.5
    made = Synthetic(hidden=hidden, head=head)
    vision = made.cut(K)
    answer = replace(made, hidden=hidden[:N_ANSWER]).cut(K)
    n_vision = len(hidden)
    record = Record(
        key=sha256_hex(str(number).encode()),
        text_ids=rng.integers(0, VOCABULARY, N_TEXT, dtype=np.int32),
        images=(ImageSpan(text_position=4, start=0, count=n_vision, grids=(GRID,), original_size=(756, 756)),),
        vision=vision.top_logits(),
        affinity=affinity(text_states(made, N_TEXT, number), hidden).numpy(),
        answer_positions=np.arange(N_TEXT - N_ANSWER, N_TEXT, dtype=np.int32),
        answer=answer.top_logits(mean=False),
    )
    return CapturedRow(hint=RowHint(row=number, id=str(number)), key=record.key, record=record, text_sha256="00" * 32)
