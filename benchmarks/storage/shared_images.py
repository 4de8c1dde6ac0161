"""What storing an image once saves if several rows show it, and what the search costs if no rows do.

    python -m benchmarks.storage.shared_images

Two datasets of ROWS rows pass a random teacher (V = 32,000, 144 vision tokens) and the job's own code. In the first,
40% of the rows show an image that two other rows also show (groups of three, eight rows apart); in the second, each row
has its own image. Reports the bytes of the shard by part, and CPU seconds of capturing and writing with sharing and
without, run alternately, medians.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measuring import medians
from benchmarks.common.random_llava import Shape, Text, Tower, random_model, write_noise
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.shared_images import SharedImages
from emkd.pipeline.worker import stored_bytes
from emkd.samples.dataset import Dataset
from emkd.storage.lifecycle.create import create_cache
from emkd.storage.shards.writer import ShardWriter
from emkd.vlm.loading import load

ROWS, SHARED, GROUP, ROUNDS = 60, 24, 3, 3
SHAPE = Shape(
    text=Text(hidden=256, layers=4, heads=4, key_value_heads=2, intermediate=688, rows=32_000, tied=True),
    tower=Tower(hidden=128, layers=2, heads=4, intermediate=512, side=168, patch=14),
    n_tokens=32_000,
)


def image_of(row: int, shared: int) -> int:
    """Return the image that a row shows; the first `shared` rows show a third as many images."""
    return row % (shared // GROUP) if row < shared else row


class Rows:
    """A dataset, captured into shards that are deleted."""

    def __init__(self, folder: Path, teacher: Path, shared: int) -> None:
        path = folder / f"rows-{shared}.parquet"
        write_noise(
            path,
            n=ROWS,
            n_tokens=SHAPE.n_tokens,
            side=SHAPE.tower.side,
            words=(30, 60),
            image_of=lambda row: image_of(row, shared) if shared else row,
        )
        self.dataset, self.cache = Dataset(str(path)), str(folder / f"cache-{shared}")
        settings = JobSettings(
            teacher=str(teacher),
            data=str(path),
            cache=self.cache,
            logit_error="none",
            rows_per_shard=ROWS,
            gpus_per_worker=0,
        )
        self.manifest, tokenizer = job_manifest(settings, self.dataset)
        self.files = create_cache(self.cache, self.manifest, tokenizer)

    def capture(self, teacher: Teacher, attempt: str, sharing: bool) -> dict[str, Any]:
        """Return bytes by part, CPU seconds, and the number of shared images. Nothing is committed."""
        shared = SharedImages(self.manifest.teacher.dtype) if sharing else None
        started = time.process_time()
        writer = ShardWriter(self.files, 0, attempt, self.manifest)
        for row in teacher.captured(teacher.reading(self.dataset, range(ROWS)), shared):
            writer.add(row)
        index = writer.finish()
        seconds = time.process_time() - started
        parts: dict[str, int] = {}
        for name, digest in index.objects.items():
            part = name.partition("/")[0]
            parts[part] = parts.get(part, 0) + digest.n_bytes
        writer.abandon()
        vision = sum(size for name, size in parts.items() if name.startswith("vision"))
        return {
            "vision_bytes": vision,
            "all_bytes": stored_bytes(index),
            "cpu_seconds": seconds,
            "images_shared": shared.n_shared if shared else 0,
            "images_different": shared.n_different if shared else 0,
        }


def measure() -> dict[str, Any]:
    """Return `sharing`: medians and raw repeats of both datasets, with sharing and without."""
    with tempfile.TemporaryDirectory(prefix="emkd-sharing-") as scratch:
        folder = Path(scratch)
        vlm = random_model(SHAPE, 1, "cpu")
        for part in (vlm.model, vlm.processor):
            part.save_pretrained(folder / "teacher")
        sets = {"40% of rows share images": SHARED, "none do": 0}
        rows = {name: Rows(folder, folder / "teacher", shared) for name, shared in sets.items()}
        settings = CaptureSettings(
            top_k=64, answer_top_k=64, logits_precision="bfloat16", batch_tokens=8192, max_length=None
        )
        teacher = Teacher(load(str(folder / "teacher")), settings)
        runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"with": [], "without": []} for name in rows}
        for number in range(ROUNDS + 1):
            for name, one in rows.items():
                for way in ("with", "without"):
                    found = one.capture(teacher, f"{way}-{number}", way == "with")
                    if number:
                        runs[name][way].append(found)
    middle = {name: {way: medians(found) for way, found in ways.items()} for name, ways in runs.items()}
    return {"sharing": {"median": middle, "runs": runs}}


def show(result: dict[str, Any]) -> str:
    """Return a table in Markdown."""
    lines = ["rows | sharing | images shared | vision bytes | all bytes | CPU seconds", "---|---|---|---|---|---"]
    for name, ways in result["sharing"]["median"].items():
        for way, one in ways.items():
            sizes = f"{one['vision_bytes']:,.0f} | {one['all_bytes']:,.0f}"
            lines.append(f"{name} | {way} | {one['images_shared']:.0f} | {sizes} | {one['cpu_seconds']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure()
    print(json.dumps(result, indent=2) if arguments.json else show(result))


if __name__ == "__main__":
    main()
