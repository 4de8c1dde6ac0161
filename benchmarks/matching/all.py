"""Matching and losses at the full vocabulary: cost matrix, assignment, memory, and what cutting the teacher changes.

    python -m benchmarks.matching.all DEMO_OUT

Runs cost_matrix.py, loss_memory.py and fidelity/cut_logits.py in turn on one thread and writes
benchmarks/results/matching.json. DEMO_OUT is a folder that `emkd demo` made. Needs about 10 minutes and 9 GiB.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.fidelity import cut_logits
from benchmarks.matching import cost_matrix, loss_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    found: dict[str, Any] = {}
    for name, part in {
        "cost": lambda: (cost_matrix, cost_matrix.measure()),
        "memory": lambda: (loss_memory, loss_memory.measure()),
        "fidelity": lambda: (cut_logits, cut_logits.measure(arguments.demo)),
    }.items():
        module, found[name] = part()
        print(f"\n# {name}\n\n{module.show(found[name])}", flush=True)
    headline = {
        "cost_speedup": found["cost"]["against_dense"]["cost_speedup"],
        "peak_memory_ratio": found["memory"]["peak_memory_ratio"],
        **{name: found["fidelity"][name] for name in ("regret", "loss_error", "gradient_cosine")},
    }
    write_results(RESULTS / "matching.json", {**origin, **headline, **found})


if __name__ == "__main__":
    main()
