"""What a job saves by reading the next shard's rows while the teacher works.

    python -m benchmarks.storage.read_ahead [--shards 6] [--rounds 3]

The teacher is random and so small that decoding and preparing photographs of 2,048 x 1,536 is a large part of the job,
as it is with a teacher on a GPU. Each round captures all shards of a new cache with one worker, alternately in two
ways:

    in-turn  capture_shard(n): reads the rows of shard n before its first forward pass
    ahead    capture_shard(n, n + 1): reads the rows of the next shard in a separate thread meanwhile

`reading` is the time for reading and preparing alone. Nothing overlaps with reading a job's first shard, so S - 1 of S
shards can gain. All caches must have the same objects. Writes benchmarks/results/ahead.json.
"""

import argparse
import tempfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common.measuring import seconds
from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.common.random_llava import Shape, random_model, write_rows
from benchmarks.storage.capture_overhead import SMALL_VOCABULARY, TOWER
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


def photograph(number: int) -> bytes:
    """Return a smooth image of a photograph's size, as JPEG."""
    coarse = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(coarse).resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Job:
    """A worker with its teacher loaded, which captures the same rows into any number of caches."""

    def __init__(self, shape: Shape, folder: Path, n_shards: int) -> None:
        vlm = random_model(shape, 1, "cpu")
        vlm.model.save_pretrained(folder / "teacher")
        vlm.processor.save_pretrained(folder / "teacher")
        path, n = folder / "rows.parquet", ROWS * n_shards
        write_rows(path, n=n, n_tokens=shape.n_tokens, words=(30, 30), image=photograph)
        self.folder, self.n_shards = folder, n_shards
        self.settings = JobSettings(
            teacher=str(folder / "teacher"),
            data=str(folder / "rows.parquet"),
            cache=str(folder / "cache"),
            logit_error="none",
            rows_per_shard=ROWS,
            gpus_per_worker=0,
        )
        self.manifest, self.tokenizer = job_manifest(self.settings, Dataset(self.settings.data))
        self.worker = CaptureWorker(self.settings, self.manifest)
        self.worker.preflight([0])  # loads the teacher

    def capture(self, name: str, ahead: bool) -> float:
        """Return the seconds that all shards take, written to a new cache."""
        self.worker.settings = replace(self.settings, cache=str(self.folder / name))
        create_cache(self.worker.settings.cache, self.manifest, self.tokenizer)
        following = [number if ahead and number < self.n_shards else None for number in range(1, self.n_shards + 1)]
        return seconds(lambda: [self.worker.capture_shard(*pair) for pair in enumerate(following)])

    def read(self) -> float:
        """Return the seconds that reading and preparing all rows takes, without the teacher."""
        return seconds(lambda: [self.worker._reading(number).advance() for number in range(self.n_shards)])

    def objects(self, name: str) -> list[Any]:
        return [read_index(LocalFiles(self.folder / name), number).objects for number in range(self.n_shards)]


def measure(shape: Shape, n_shards: int, rounds: int) -> dict[str, Any]:
    """Return medians, raw repeats, and the share of the time that reading ahead leaves.

    Raises RuntimeError if the two ways write different objects.
    """
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
                raise RuntimeError("the shards differ between in-turn and ahead; expected the same objects")
            for way, taken in found.items():
                if number:  # the first round warms up
                    runs[way].append(taken)
    middle = {way: median(repeats) for way, repeats in runs.items()}
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
    parser.add_argument("--output", type=Path, default=RESULTS / "ahead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    found = measure(SHAPE, arguments.shards, arguments.rounds)
    print("in turn, s | ahead, s | ahead / in turn | reading / in turn\n---|---|---|---")
    both = " | ".join(f"{found['median'][way]:.2f}" for way in ("in-turn", "ahead"))
    print(f"{both} | {found['ahead_over_in_turn']:.2f} | {found['reading_share']:.2f}")
    write_results(arguments.output, {**origin, **found})


if __name__ == "__main__":
    main()
