"""How the demonstration's hyperparameters and the matching's cost were chosen, on the validation scenes only.

    python -m benchmarks.demo.hyperparameters DEMO_OUT

DEMO_OUT is a folder that `emkd demo` made; the script uses its student after phase 1, cache and data. EM-KD is
trained with each cost of the matching and with other weights of VSD, over --seeds seeds. SFT, RLD and EM-KD are each
trained with every choice of learning rate and steps, over --grid-seeds seeds (0 leaves it out), so that each is
compared at its own best and no choice favours one of them. It does not read the test scenes. Writes
benchmarks/results/demo_choice.json.
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


def choices(seeds: int, grid_seeds: int) -> list[tuple[str, dict[str, Any], int]]:
    """Return (variant, overrides of the recipe by path, seeds) of each entry; without the grid if it has no seeds."""
    own = RECIPE["losses"]["beta"]
    costs = [{f"losses.{name}": value for name, value in cost.items()} for cost in COSTS.values()]
    found: list[tuple[str, dict[str, Any], int]] = [("emkd", flags, seeds) for flags in costs]
    found += [("emkd", {"losses.beta": beta}, seeds) for beta in BETAS if beta != own]
    if not grid_seeds:
        return found
    return found + [
        (variant, {"training.learning_rate": rate, "training.max_steps": steps}, grid_seeds)
        for variant, rate, steps in itertools.product(CHOSEN_VARIANTS, LEARNING_RATES, STEPS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid-seeds", type=int, default=1)
    arguments = parser.parse_args()
    origin = provenance()
    results = []
    with one_quiet_thread():
        for variant, flags, seeds in choices(arguments.seeds, arguments.grid_seeds):
            found = [
                accuracy(arguments.demo, VARIANTS[variant], seed, split="validation", **flags) for seed in range(seeds)
            ]
            results.append({"variant": variant, "flags": flags, "accuracy": found})
            print(f"{variant} {flags}: {mean(found):.4f}", flush=True)
    write_results(RESULTS / "demo_choice.json", {**origin, "split": "validation", "results": results})


if __name__ == "__main__":
    main()
