"""The demonstration over many seeds with all ablations, and the paired differences of its variants.

    python -m benchmarks.demo.seeds OUT --seeds 10

Runs `emkd demo --out OUT --seeds 10 --ablate`, test scenes included: run it once, after everything is chosen.
Writes benchmarks/results/demo_seeds.json.
"""

import argparse
from pathlib import Path

from benchmarks.common.provenance import RESULTS, provenance, write_results
from emkd.demo import run_demo
from emkd.demo.report import PAIRED, paired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    origin = provenance()
    results = run_demo(arguments.out, seeds=arguments.seeds, ablate=True)
    students = results["students"]
    differences = {}
    for one, other in PAIRED:
        difference, error = paired(students[one]["accuracy"], students[other]["accuracy"])
        differences[f"{one} - {other}"] = {"mean": difference, "standard_error": error}
    found = {**origin, "split": "test", "paired_differences": differences, "results": results}
    write_results(RESULTS / "demo_seeds.json", found)


if __name__ == "__main__":
    main()
