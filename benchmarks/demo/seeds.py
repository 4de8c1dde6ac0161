"""The demonstration over many seeds with all ablations, and the paired differences of its variants, on the test scenes.

    python -m benchmarks.demo.seeds DEMO_OUT --seeds 10

DEMO_OUT is a folder that `emkd demo` made. Students that it does not have yet are trained as `emkd demo` does and stay
there, so that an interrupted run goes on. Nothing was chosen on the test scenes. Writes
benchmarks/results/demo_seeds.json.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import RESULTS, provenance, write_results
from emkd.demo.report import PAIRED, paired
from emkd.demo.run import evaluate, judge_pairs, train_one
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import ABLATIONS, VARIANTS

ALL = {**VARIANTS, **ABLATIONS}


def accuracy(demo: Path, variant: str, losses: dict[str, Any], seed: int) -> float:
    """Return a student's accuracy; train it if the folder has no whole one."""
    folder = demo / "students" / f"{variant}-{seed}"
    if not (folder / "recipe.yaml").exists():  # the last file that a run writes
        shutil.rmtree(folder, ignore_errors=True)
        train_one(demo, folder, losses, seed)
    found = evaluate(folder, demo)["accuracy"]
    print(f"{variant} {seed}: {found:.4f}", flush=True)
    return found


def measure(demo: Path, seeds: int, variants: list[str]) -> dict[str, Any]:
    """Return accuracies of teacher, the student after phase 1 and all variants, and the pairs of the first emkd."""
    return {
        **{name: evaluate(demo / name, demo) for name in ("teacher", "student-init")},
        "students": {
            variant: {"accuracy": [accuracy(demo, variant, ALL[variant], seed) for seed in range(seeds)]}
            for variant in variants
        },
        "pairs": {
            "before": judge_pairs(demo, demo / "student-init"),
            "after": judge_pairs(demo, demo / "students" / "emkd-0"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--variants", nargs="+", choices=ALL, default=list(ALL))
    arguments = parser.parse_args()
    origin = provenance()
    with one_quiet_thread():
        results = measure(arguments.demo, arguments.seeds, arguments.variants)
    students, differences = results["students"], {}
    for one, other in PAIRED:
        if one in students and other in students:
            difference, error = paired(students[one]["accuracy"], students[other]["accuracy"])
            differences[f"{one} - {other}"] = {"mean": difference, "standard_error": error}
    found = {**origin, "split": "test", "paired_differences": differences, "results": results}
    write_results(RESULTS / "demo_seeds.json", found)


if __name__ == "__main__":
    main()
