"""The demonstration over many seeds with all ablations, and the paired differences of its variants.

    python benchmarks/demo_seeds.py OUT --seeds 10

Runs `emkd demo --out OUT --seeds 10 --ablate`, test scenes included: to be run once, when everything is chosen.
Writes benchmarks/results/demo_seeds.json.
"""

import argparse
import json
from pathlib import Path

from provenance import provenance

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
    path = Path(__file__).parent / "results" / "demo_seeds.json"
    found = {**origin, "split": "test", "paired_differences": differences, "results": results}
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
