"""How the demonstration's hyperparameters and the matching's cost were chosen, on the validation scenes only.

    python -m benchmarks.demo.hyperparameters DEMO_OUT --seeds 2

DEMO_OUT is a folder that `emkd demo` made; the script uses its student after phase 1, cache and data. SFT, RLD and
EM-KD are each trained with every choice of learning rate and steps, so that each is compared at its own best and no
choice favours one of them; EM-KD also with other weights of VSD and with each cost of the matching, over --cost-seeds
seeds. It does not read the test scenes. Writes benchmarks/results/demo_choice.json.
"""

import argparse
import itertools
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.demo.students import accuracy
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import COSTS, RECIPE, VARIANTS

LEARNING_RATES = (1e-3, 2e-3, 4e-3)
STEPS = (150, 300)
CHOSEN_VARIANTS = ("sft", "rld", "emkd")
BETAS = (0.25, 0.5, 1.0, 2.0)


def choices() -> list[tuple[str, dict[str, Any], bool]]:
    """Return (variant, overrides of the recipe by path, whether it takes the seeds of the costs) of each entry."""
    found = [
        (variant, {"training.learning_rate": rate, "training.max_steps": steps}, False)
        for variant, rate, steps in itertools.product(CHOSEN_VARIANTS, LEARNING_RATES, STEPS)
    ]
    found += [("emkd", {"losses.beta": beta}, False) for beta in BETAS if beta != RECIPE["losses"]["beta"]]
    return found + [
        ("emkd", {f"losses.{name}": value for name, value in cost.items()}, True) for cost in COSTS.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cost-seeds", type=int, default=4)
    arguments = parser.parse_args()
    origin = provenance()
    results = []
    with one_quiet_thread():
        for variant, flags, cost in choices():
            seeds = range(arguments.cost_seeds if cost else arguments.seeds)
            found = [accuracy(arguments.demo, VARIANTS[variant], seed, split="validation", **flags) for seed in seeds]
            results.append({"variant": variant, "flags": flags, "accuracy": found})
            print(f"{variant} {flags}: {mean(found):.4f}", flush=True)
    write_results(RESULTS / "demo_choice.json", {**origin, "split": "validation", "results": results})


if __name__ == "__main__":
    main()
