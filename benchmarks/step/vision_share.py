"""The variance that losses.vision_share adds to a gradient, on the demonstration's student and cache.

    python -m benchmarks.step.vision_share DEMO_FOLDER [--output benchmarks/results/vision_share.json]

DEMO_FOLDER is the output of `emkd demo`. EM-KD's gradient (the demonstration's weights) of one optimizer step of 16
samples, for the student after phase 1, with shares of the pairs drawn DRAWS times: its distance from the gradient with
all pairs, relative to that, root mean square; and for comparison that of steps of other samples from their mean, which
training has anyway. All parameters together; float32.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.provenance import RESULTS, provenance, write_results
from emkd.demo.variants import RECIPE
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache
from emkd.trainer.data.run_data import encoder
from emkd.trainer.data.samples import Collator, StudentSamples, TeacherLimits
from emkd.trainer.objective.objective import Objective
from emkd.trainer.recipe.recipe import make_recipe
from emkd.vlm.codes import Codes
from emkd.vlm.loading import load

SHARES = (0.75, 0.5, 0.25, 0.125)
DRAWS = 30
STEPS = 20
SIZE = 16


def batches(folder: Path, vlm: Any, cache: Cache) -> Iterator[dict[str, Any]]:
    """Yield STEPS batches of the rows that the cache was made of."""
    dataset = Dataset(str(folder / "data" / "train.parquet"))
    limits = TeacherLimits(vocabulary=cache.manifest.vocabulary_size, n_student_tokens=vlm.n_tokens)
    samples = StudentSamples(dataset, encoder(vlm, None), range(len(cache)), cache, limits)
    for first in range(0, STEPS * SIZE, SIZE):
        yield Collator(0)([samples[number] for number in range(first, first + SIZE)])


def gradient(vlm: Any, objective: Objective, batch: dict[str, Any], share: float) -> torch.Tensor:
    """Return the gradient of all parameters, one after the other."""
    objective.vision_share = share
    vlm.model.zero_grad()
    counts = objective.count(batch["samples"])
    objective(vlm.model, vlm.model, batch["inputs"], batch["samples"], counts).total.backward()
    return torch.cat([p.grad.flatten().clone() for p in vlm.model.parameters() if p.grad is not None])


def deviation(draws: list[torch.Tensor], centre: torch.Tensor, spread: int = 0) -> float:
    """Root mean square distance from `centre`, relative to it. spread: 1 if `centre` is the draws' own mean"""
    squares = sum(float((draw - centre).double().norm() ** 2) for draw in draws)
    return float((squares / (len(draws) - spread)) ** 0.5 / centre.double().norm())


def measure(folder: Path) -> dict[str, float]:
    """Return the relative deviation by share, and under `samples` that of the samples of a step."""
    vlm = load(str(folder / "student-init"), trust_remote_code=True)
    cache = Cache.open(folder / "cache")
    losses = make_recipe(RECIPE, "the demonstration's recipe").losses
    distance = losses.distance(has_codes=True)
    codes = Codes(cache.basis, "cpu") if cache.basis is not None else None
    objective = Objective(losses.weights, vlm.n_tokens, distance, cost=losses.compared, codes=codes)
    steps = list(batches(folder, vlm, cache))
    torch.manual_seed(0)
    found: dict[str, float] = {}
    whole = gradient(vlm, objective, steps[0], 1.0)
    for share in SHARES:
        found[str(share)] = deviation([gradient(vlm, objective, steps[0], share) for _ in range(DRAWS)], whole)
    others = [gradient(vlm, objective, batch, 1.0) for batch in steps]
    found["samples"] = deviation(others, torch.stack(others).mean(dim=0), spread=1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "vision_share.json")
    options = parser.parse_args()
    origin, found = provenance(), measure(options.folder)
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    write_results(options.output, {**origin, "vision_share": found})


if __name__ == "__main__":
    main()
