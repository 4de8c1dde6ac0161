"""What capturing costs on top of the teacher's forward passes, and what encoding a sample costs.

    python -m benchmarks.storage.capture_overhead          # cpu-100m, cpu-100m-32k, demo, and gpu if there is one
    python -m benchmarks.storage.capture_overhead --cases tiny --output capture.json

`capture_overhead` is the ratio of two ways through the same rows, run alternately, medians of the repeats:

    worker  CaptureWorker.capture_shard without Ray: rows are read, images decoded and prepared, batched, passed
            through the teacher, cut to their top-k, encoded, written, synced and committed
    bare    the same batches, prepared beforehand: each batch's forward pass, and the LM head at the same positions, in
            chunks of the same size; nothing is kept

Each repeat is a shard of rows with the same lengths; the first one is dropped. A shard has few batches here, so the
parts that nothing overlaps with (first rows, last rows, commit) weigh more than in a job's shards of 256 rows. CPU
seconds count all threads of the process; the bare loop has one.

`encode_ms` is the CPU time for a sample of 2,916 vision tokens (54 x 54), k = 64, with its affinity to 200 text tokens:
`write_shard` of 8 samples of common/synthetic_logits.py, all threads of the process counted, divided by 8. Its part
`disk` is the time to write and sync as many bytes to as many files.

    cpu-100m      104M parameters, V = 151,936 (tied, 512 wide, 8 layers), 2,916 vision tokens a sample
    cpu-100m-32k  101M parameters, V = 32,000 (tied, 768 wide, 12 layers), 729
    demo          the demonstration's teacher, random, 64 vision tokens, V = 23
    gpu           7B, V = 151,936, bfloat16, 729
    tiny          to try the script with

Writes benchmarks/results/capture.json.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.devices import NOT_MEASURED, measure_cases
from benchmarks.common.measuring import Figures, medians, timed
from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.common.random_llava import SO400M, Shape, Text, Tower, demo_teacher, random_model, write_noise
from benchmarks.storage.encode_time import encode_ms
from emkd.demo.scenes import write_scenes
from emkd.pipeline.batching import batches
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.preflight import PREFLIGHT_ROWS
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded
from emkd.storage.lifecycle.create import create_cache
from emkd.vlm.forward import collate, last_hidden_state, lm_logits, to_model
from emkd.vlm.loading import VisionLanguageModel
from emkd.vlm.states import States


@dataclass(frozen=True, kw_only=True)
class Case:
    """A teacher and its rows.

    teacher:    makes the model on a device
    write_rows: writes n rows as Parquet
    rows:       rows of a shard
    rounds:     repeats of each way, the first one not counted
    """

    teacher: Callable[[str], VisionLanguageModel]
    write_rows: Callable[[Path, int], object]
    rows: int
    top_k: int = 8
    rounds: int = 3


def _random(shape: Shape, rows: int, rounds: int = 3, words: int = 75) -> Case:
    """Return a case whose rows all have the same length: questions and answers of exactly `words` words."""

    def write(path: Path, n: int) -> None:
        write_noise(path, n=n, n_tokens=shape.n_tokens, side=shape.tower.side, words=(words, words))

    return Case(teacher=partial(random_model, shape, 1), write_rows=write, rows=rows, rounds=rounds)


def _scenes(path: Path, n: int) -> None:
    write_scenes(path, n=n, pool="train", seed=1)


TOWER = Tower(hidden=192, layers=4, heads=4, intermediate=768, side=756, patch=14)
LARGE_VOCABULARY = Text(hidden=512, layers=8, heads=8, key_value_heads=2, intermediate=1408, rows=151_936, tied=True)
SMALL_VOCABULARY = Text(hidden=768, layers=12, heads=12, key_value_heads=4, intermediate=2048, rows=32_000, tied=True)
SEVEN_B = Text(hidden=3584, layers=28, heads=28, key_value_heads=4, intermediate=18_944, rows=152_064)
TINY = Shape(
    text=Text(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=64, rows=100),
    tower=Tower(hidden=32, layers=2, heads=2, intermediate=48, side=20, patch=5),
    n_tokens=100,
)

CASES = {
    "cpu-100m": _random(Shape(text=LARGE_VOCABULARY, tower=TOWER, n_tokens=151_936), rows=4),
    "cpu-100m-32k": _random(Shape(text=SMALL_VOCABULARY, tower=replace(TOWER, side=378), n_tokens=32_000), rows=16),
    "demo": Case(teacher=demo_teacher, write_rows=_scenes, rows=256, top_k=8, rounds=7),
    "gpu": _random(Shape(text=SEVEN_B, tower=SO400M, n_tokens=151_936, dtype=torch.bfloat16), rows=64, rounds=5),
    "tiny": _random(TINY, rows=4, words=4),
}


class Ways:
    """Both ways through the shards of one case. As in a job, the worker loads its teacher from a checkpoint."""

    def __init__(self, case: Case, folder: Path, device: str) -> None:
        vlm = case.teacher(device)
        self.n_parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
        vlm.model.save_pretrained(folder / "teacher")
        vlm.processor.save_pretrained(folder / "teacher")
        del vlm
        case.write_rows(folder / "rows.parquet", case.rows * (case.rounds + 1))
        settings = JobSettings(
            teacher=str(folder / "teacher"),
            data=str(folder / "rows.parquet"),
            cache=str(folder / "cache"),
            top_k=case.top_k,
            answer_top_k=case.top_k,
            rows_per_shard=case.rows,
            gpus_per_worker=float(device == "cuda"),
        )
        self.dataset = Dataset(settings.data)
        asked, tokenizer = job_manifest(settings, self.dataset)
        self.captor = CaptureWorker(settings, asked)
        basis = self.captor.choose_basis(range(min(PREFLIGHT_ROWS, self.dataset.n_rows))).basis
        data = basis.to_bytes()
        self.manifest = self.captor.manifest = asked.with_basis(basis.identity(data))
        create_cache(settings.cache, self.manifest, tokenizer, data)
        self.captor.preflight([0])
        self.teacher = self.captor._loaded()[0]

    def worker(self, shard: int) -> Figures:
        """Time the worker. Raises RuntimeError if it does not pass the batches of the bare loop."""
        return timed(lambda: self._capture(shard))

    def _capture(self, shard: int) -> None:
        report = self.captor.capture_shard(shard)
        if report.n_skipped or report.n_halved or not report.committed:
            raise RuntimeError(f"expected a committed shard without skipped rows or halved batches, got {report}")

    def bare(self, shard: int) -> Figures:
        """Time the teacher's forward passes and LM head alone."""
        items = [self.teacher.encoder(self.dataset.sample(row)) for row in self.manifest.rows(shard)]
        planned = [
            [items[position] for position in positions]
            for positions in batches([item.n_tokens for item in items], self.manifest.batch_tokens)
        ]
        return timed(lambda: self._forward(planned))

    @torch.inference_mode()
    def _forward(self, planned: list[list[Encoded]]) -> None:
        teacher, model = self.teacher, self.teacher.vlm.model
        for batch in planned:
            inputs = to_model(collate(batch, teacher.pad_token_id), model)
            for item, hidden in zip(batch, last_hidden_state(model, inputs), strict=True):
                states = States.of(item, hidden)
                for part in (states.vision, states.predicting):
                    for rows in part.split(teacher.chunk):
                        lm_logits(model, rows, teacher.vlm.n_tokens)
        if model.device.type == "cuda":
            torch.cuda.synchronize()


def measure_case(name: str, device: str) -> dict[str, Any]:
    """Return medians and raw repeats of one case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="emkd-capture-") as scratch:
        ways = Ways(case, Path(scratch), device)
        runs: dict[str, list[Figures]] = {"bare": [], "worker": []}
        for shard in range(case.rounds + 1):
            for way, run in (("bare", ways.bare), ("worker", ways.worker)):
                found = run(shard)
                if shard:
                    runs[way].append(found)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": ways.n_parameters,
        "rows": case.rows,
        "median": {way: medians(repeats) for way, repeats in runs.items()},
        "runs": runs,
    }


def measure(names: list[str] | None = None) -> dict[str, Any]:
    """Measure some cases; default: all but `tiny`. `gpu` is "not measured" without a GPU."""
    encoding = encode_ms()
    cases = measure_cases(names or ["cpu-100m", "cpu-100m-32k", "demo", "gpu"], measure_case)
    overhead = {name: case if case == NOT_MEASURED else overhead_of(case) for name, case in cases.items()}
    return {"capture_overhead": overhead, **encoding, "cases": cases}


def overhead_of(case: dict[str, Any]) -> float:
    """Return the worker's seconds divided by the bare loop's."""
    return float(case["median"]["worker"]["seconds"] / case["median"]["bare"]["seconds"])


def show(result: dict[str, Any]) -> str:
    """Return a table in Markdown, and a line."""
    lines = ["case | way | seconds | CPU seconds | against bare", "---|---|---|---|---"]
    for name, case in result["cases"].items():
        if case == NOT_MEASURED:
            lines.append(f"{name} | {NOT_MEASURED} | | |")
            continue
        for way, one in case["median"].items():
            ratio = one["seconds"] / case["median"]["bare"]["seconds"]
            lines.append(f"{name} | {way} | {one['seconds']:.3f} | {one['cpu_seconds']:.3f} | {ratio:.3f}")
    lines += ["", f"encode and write, a sample of 2,916 vision tokens: {result['encode_ms']:.1f} ms of CPU time"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS / "capture.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    result = measure(arguments.cases)
    print(show(result))
    write_results(arguments.output, {**origin, **result})


if __name__ == "__main__":
    main()
