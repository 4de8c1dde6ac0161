"""Matching and losses at full vocabulary: cost matrix, assignment, memory, and what a cut of the teacher changes.

    python benchmarks/matching.py DEMO_OUT

Runs cost.py, memory.py and fidelity.py, each of which says what it measures, one after the other on one thread, and
writes benchmarks/results/matching.json. DEMO_OUT is a folder that `emkd demo` made. Takes about 10 minutes and 9 GiB.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cost
import fidelity
import memory
import torch
from provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    found: dict[str, Any] = {}
    for name, part in {
        "cost": lambda: (cost, cost.measure()),
        "memory": lambda: (memory, memory.measure()),
        "fidelity": lambda: (fidelity, fidelity.measure(arguments.demo)),
    }.items():
        module, found[name] = part()
        print(f"\n# {name}\n\n{module.show(found[name])}", flush=True)
    headline = {
        "cost_speedup": found["cost"]["against_dense"]["cost_speedup"],
        "peak_memory_ratio": found["memory"]["peak_memory_ratio"],
        **{name: found["fidelity"][name] for name in ("regret", "loss_error", "gradient_cosine")},
    }
    path = Path(__file__).parent / "results" / "matching.json"
    path.write_text(json.dumps({**origin, **headline, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
