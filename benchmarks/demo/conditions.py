"""What the demonstration's result depends on: each of its conditions is taken away in turn, on the validation scenes.

    python -m benchmarks.demo.conditions DEMO_OUT --seeds 3

DEMO_OUT is a folder that `emkd demo` made. Each condition has SFT, RLD, EM-KD, and EM-KD matched by pooling and at
random:

    demo           as the demonstration is
    all cells      all eight cells of a scene are asked for, instead of one
    no naming      another teacher, whose vision tokens do not name what they show
    content alone  another teacher, whose vision tokens name their content, and not their cell
    aligned grids  the student's processor pads as the teacher's does
    paper's beta   VSD has the weight 0.25
    right labels   no answer is wrong

Writes benchmarks/results/demo_conditions.json.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.demo.students import accuracy
from emkd.demo.regime import DEMO, Regime
from emkd.demo.run import cache_demo, evaluate, judge_pairs, make_data, make_student, make_teacher
from emkd.demo.scenes import N_CELLS
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import ABLATIONS, VARIANTS

CONDITIONS: dict[str, Regime] = {
    "demo": DEMO,
    "all cells": replace(DEMO, questions=N_CELLS),
    "no naming": replace(DEMO, naming=0.0),
    "content alone": replace(DEMO, name=1.0),
    "aligned grids": replace(DEMO, aligned=True),
    "paper's beta": replace(DEMO, beta=0.25),
    "right labels": replace(DEMO, wrong_answers=0.0),
}
STUDENTS = {**VARIANTS, "emkd-pooled": ABLATIONS["emkd-pooled"]}


def prepare(demo: Path, folder: Path, regime: Regime) -> None:
    """Make a folder like DEMO_OUT with a condition's data, teacher, cache and initial student."""
    make_data(folder / "data", regime)
    if (regime.naming, regime.name) == (DEMO.naming, DEMO.name):
        shutil.copytree(demo / "teacher", folder / "teacher")
    else:
        make_teacher(folder, regime)
    cache_demo(folder)
    make_student(folder, regime)


def measure(demo: Path, folder: Path, regime: Regime, seeds: int) -> dict[str, Any]:
    """Return accuracies of the teacher, the student after phase 1 and each variant, and the pairs before phase 2."""
    prepare(demo, folder, regime)
    return {
        "teacher": evaluate(folder / "teacher", folder, "validation")["accuracy"],
        "student-init": evaluate(folder / "student-init", folder, "validation")["accuracy"],
        "students": {
            name: [accuracy(folder, losses, seed, split="validation", regime=regime) for seed in range(seeds)]
            for name, losses in STUDENTS.items()
        },
        "pairs": judge_pairs(folder, folder / "student-init", regime),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    origin = provenance()
    results: dict[str, Any] = {}
    with one_quiet_thread(), tempfile.TemporaryDirectory(prefix="emkd-conditions-") as scratch:
        for number, (name, regime) in enumerate(CONDITIONS.items()):
            results[name] = measure(arguments.demo, Path(scratch) / str(number), regime, arguments.seeds)
            print(name, results[name], flush=True)
    write_results(RESULTS / "demo_conditions.json", {**origin, "split": "validation", "conditions": results})


if __name__ == "__main__":
    main()
