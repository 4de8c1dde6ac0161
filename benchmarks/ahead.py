"""What it saves to read the next shard's rows behind the teacher's passes.

    python benchmarks/ahead.py [--shards 6] [--rounds 3]

A random teacher that is so small that decoding and preparing photographs of 2,048 x 1,536 is a good part of the job, as
it is beside a GPU. Each round captures all shards of a new cache with one worker, in two ways, by turns:

    in-turn  capture_shard(n): its rows are read before its first pass
    ahead    capture_shard(n, n + 1): those of the next shard are read in a thread of its own meanwhile

`reading` is the time for reading and preparing alone. The first shard of a job has nothing to hide behind, so that of S
shards S - 1 can gain. All caches have to have the same objects. Writes benchmarks/results/ahead.json.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from capture import SMALL_VOCABULARY, TOWER
from PIL import Image
from provenance import provenance
from random_llava import SCHEMA, SPECIALS, Shape, random_model
from random_llava import _words as words_of

from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples.dataset import Dataset
from emkd.storage.index.commit import read_index
from emkd.storage.lifecycle.create import create_cache
from emkd.storage.objects.local import LocalFiles

PHOTOGRAPH = (2048, 1536)
ROWS = 8
SHAPE = Shape(
    text=replace(SMALL_VOCABULARY, hidden=256, layers=3, heads=4, key_value_heads=4, intermediate=704),
    tower=replace(TOWER, side=336, patch=28, layers=2),
    n_tokens=32_000,
)


def write_photographs(path: Path, n: int, n_tokens: int) -> None:
    """n rows: a smooth picture as JPEG, a question and an answer of 30 words."""
    rng, known = random.Random(0), words_of(n_tokens)[len(SPECIALS) :]
    rows = []
    for number in range(n):
        coarse = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(coarse).resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        asked, said = (" ".join(rng.choices(known, k=30)) for _ in range(2))
        messages = [{"role": "user", "content": f"<image> {asked}"}, {"role": "assistant", "content": said}]
        rows.append({"id": str(number), "images": [{"bytes": buffer.getvalue(), "path": None}], "messages": messages})
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)


class Job:
    """A worker with its teacher loaded, and as many caches as it is asked for."""

    def __init__(self, shape: Shape, folder: Path, n_shards: int) -> None:
        vlm = random_model(shape, 1, "cpu")
        vlm.model.save_pretrained(folder / "teacher")
        vlm.processor.save_pretrained(folder / "teacher")
        write_photographs(folder / "rows.parquet", ROWS * n_shards, shape.n_tokens)
        self.folder, self.n_shards = folder, n_shards
        self.settings = JobSettings(
            teacher=str(folder / "teacher"),
            data=str(folder / "rows.parquet"),
            cache=str(folder / "cache"),
            rows_per_shard=ROWS,
            gpus_per_worker=0,
        )
        self.manifest, self.tokenizer = job_manifest(self.settings, Dataset(self.settings.data))
        self.worker = CaptureWorker(self.settings, self.manifest)
        self.worker.preflight([0])  # loads the teacher

    def capture(self, name: str, ahead: bool) -> float:
        """Seconds for all shards, into a new cache."""
        self.worker.settings = replace(self.settings, cache=str(self.folder / name))
        create_cache(self.worker.settings.cache, self.manifest, self.tokenizer)
        began = time.perf_counter()
        for number in range(self.n_shards):
            following = number + 1 if ahead and number + 1 < self.n_shards else None
            self.worker.capture_shard(number, following)
        return time.perf_counter() - began

    def read(self) -> float:
        """Seconds for reading and preparing all rows alone."""
        began = time.perf_counter()
        for number in range(self.n_shards):
            self.worker._reading(number).advance()
        return time.perf_counter() - began

    def objects(self, name: str) -> list[Any]:
        return [read_index(LocalFiles(self.folder / name), number).objects for number in range(self.n_shards)]


def measure(shape: Shape, n_shards: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="emkd-ahead-") as scratch:
        job = Job(shape, Path(scratch), n_shards)
        runs: dict[str, list[float]] = {"in-turn": [], "ahead": [], "reading": []}
        for number in range(rounds + 1):
            found = {
                "in-turn": job.capture(f"in-turn-{number}", ahead=False),
                "ahead": job.capture(f"ahead-{number}", ahead=True),
                "reading": job.read(),
            }
            if job.objects(f"in-turn-{number}") != job.objects(f"ahead-{number}"):
                raise RuntimeError("the two ways made different shards")
            for way, seconds in found.items():
                if number:  # the first round warms up
                    runs[way].append(seconds)
    middle = {way: median(some) for way, some in runs.items()}
    return {
        "rows": ROWS * n_shards,
        "shards": n_shards,
        "median": middle,
        "ahead_over_in_turn": middle["ahead"] / middle["in-turn"],
        "reading_share": middle["reading"] / middle["in-turn"],
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ahead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    found = measure(SHAPE, arguments.shards, arguments.rounds)
    print("in turn, s | ahead, s | of it | share of reading\n---|---|---|---")
    seconds = " | ".join(f"{found['median'][way]:.2f}" for way in ("in-turn", "ahead"))
    print(f"{seconds} | {found['ahead_over_in_turn']:.2f} | {found['reading_share']:.2f}")
    arguments.output.write_text(json.dumps({**origin, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
