"""How the demonstration's hyperparameters were chosen: a small grid, evaluated on the validation scenes only.

    python -m benchmarks.demo.hyperparameters DEMO_OUT --seeds 2

DEMO_OUT is a folder that `emkd demo` made; the script uses its teacher, cache and data. It trains both SFT and EM-KD
with each choice and compares each at its own best, so that no choice favours one of them. It does not read the test
scenes. Writes benchmarks/results/demo_choice.json.
"""

import argparse
import itertools
import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common.provenance import RESULTS, provenance, write_results
from emkd.demo.run import train_one
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import VARIANTS
from emkd.trainer import evaluate_checkpoint

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
STEPS = (50, 75, 150, 300)
CHOSEN_VARIANTS = ("sft", "emkd")


def measure(demo: Path, variant: str, seed: int, learning_rate: float, steps: int) -> float:
    """Train one student, return its accuracy on the validation scenes, and delete it."""
    folder = Path(tempfile.mkdtemp(prefix="emkd-choice-"))
    try:
        flags: dict[str, Any] = {"training.learning_rate": learning_rate, "training.max_steps": steps}
        train_one(demo, folder, VARIANTS[variant], seed, **flags)
        return evaluate_checkpoint(str(folder), str(demo / "data" / "validation.parquet"))["accuracy"]
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    origin = provenance()
    results = []
    with one_quiet_thread():
        for variant, rate, steps in itertools.product(CHOSEN_VARIANTS, LEARNING_RATES, STEPS):
            found = [measure(arguments.demo, variant, seed, rate, steps) for seed in range(arguments.seeds)]
            results.append({"variant": variant, "learning_rate": rate, "max_steps": steps, "accuracy": found})
            print(f"{variant} learning rate {rate} steps {steps}: {mean(found):.4f}", flush=True)
    write_results(RESULTS / "demo_choice.json", {**origin, "split": "validation", "results": results})


if __name__ == "__main__":
    main()
