"""Peak memory of a rank, for a student that is sharded over 1, 2 and 4 ranks, beside the arithmetic of emkd.

    python -m benchmarks.step.shard_memory [--output shard_memory.json]

A LLaVA of random weights, whose parameters dominate its one short sample, takes two steps of plain fine-tuning:
forward, losses, backward, AdamW. On the CPU, each rank is a process, and its peak is the largest resident size from
before the model exists until the end, without what loading takes. One rank alone is not sharded. Once with an LM head
of its own, once with a head that is the embedding.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.common.measuring import MIB, peak, reset_peak
from benchmarks.common.provenance import RESULTS, ROOT, provenance, write_results
from benchmarks.common.random_llava import Shape, Text, Tower, random_model
from emkd.samples.encode import Encoder
from emkd.trainer.data.samples import Collator, StudentSample
from emkd.trainer.data.stand_in import stand_in
from emkd.trainer.losses.weights import Weights
from emkd.trainer.objective.objective import Objective
from emkd.trainer.student import memory
from emkd.trainer.student.sharding import shard

RANKS = (1, 2, 4)
STEPS = 2


def shape(tied: bool) -> Shape:
    """170M parameters in 12 layers of the language model, and 25M (or twice as many) in embedding and head."""
    text = Text(hidden=768, layers=12, heads=12, key_value_heads=12, intermediate=5120, rows=32_768, tied=tied)
    tower = Tower(hidden=256, layers=2, heads=4, intermediate=512, side=32, patch=8)
    return Shape(text=text, tower=tower, n_tokens=32_000)


def measure(tied: bool) -> dict[str, Any]:
    """Return bytes of this rank over two steps: measured, and by arithmetic."""
    vlm = random_model(shape(tied), 0, "meta")
    sizes = memory.Sizes.of(vlm.model)
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    vlm = random_model(shape(tied), 0, "cpu")
    encoder = Encoder(vlm.processor, vlm.image_token_id)
    sample = StudentSample(encoded=stand_in(encoder), teacher=None)
    batch = Collator(0)([sample])
    objective = Objective(Weights(alpha=1.0, beta=0.0, gamma=0.0), vlm.n_tokens, stand_in=sample.encoded)
    weights = sum(p.numel() * p.element_size() for p in vlm.model.parameters())
    gc.collect()
    if n_ranks > 1:
        shard(vlm.model, torch.device("cpu"))
        gc.collect()
        weights = sum(p.to_local().nbytes for p in vlm.model.parameters())
    before = reset_peak() - weights
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-5)
    for _ in range(STEPS):
        counts = objective.count(batch["samples"])
        objective(vlm.model, vlm.model, batch["inputs"], batch["samples"], counts).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = memory.sharded(sizes, n_ranks) if n_ranks > 1 else memory.whole(sizes, 1)
    return {"peak": peak() - before, "expected": expected.total, "sizes": asdict(sizes), "parts": asdict(expected)}


def run_rank(tied: bool, output: Path) -> None:
    """Measure one rank, and let the first write the largest of all."""
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    found = measure(tied)
    found_by_all: list[Any] = [found]
    if distributed.is_initialized():
        found_by_all = [None] * distributed.get_world_size()
        distributed.all_gather_object(found_by_all, found)
    if int(os.environ.get("RANK", "0")) == 0:
        output.write_text(json.dumps(max(found_by_all, key=lambda one: one["peak"])))


def launch(n_ranks: int, tied: bool, output: Path) -> dict[str, Any]:
    """Run a case in processes of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "benchmarks.step.shard_memory", "--rank", str(output)]
    subprocess.run(
        [*command, *(["--tied"] if tied else [])], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "shard_memory.json")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tied", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.tied, options.rank)
        return
    origin, results = provenance(), {}
    scratch = options.output.with_suffix(".rank")
    for tied in (False, True):
        for n_ranks in RANKS:
            found = launch(n_ranks, tied, scratch)
            name = f"{'tied' if tied else 'own head'}, {n_ranks}"
            results[name] = found
            measured, expected = (found[what] / MIB for what in ("peak", "expected"))
            print(f"{name} ranks: peak {measured:,.0f} MiB, by arithmetic {expected:,.0f}: {measured / expected:.2f}")
    scratch.unlink()
    write_results(options.output, {**origin, "shard_memory": results})


if __name__ == "__main__":
    main()
