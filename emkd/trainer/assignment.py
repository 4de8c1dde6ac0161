"""Placeholder of the lead so that imports work; helper C writes this file."""

from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from emkd.errors import TrainingDivergedError
from emkd.trainer.meter import Stopwatch

Solver = Literal["scipy", "cuda"]


def solve(costs: list[torch.Tensor], solver: Solver = "scipy", stopwatch: Stopwatch | None = None) -> list:
    found = []
    for cost in costs:
        costs_ = cost.cpu().numpy().astype(np.float64)
        if not np.isfinite(costs_).all():
            raise TrainingDivergedError(
                "the student's vision logits are infinite or no numbers: the training has diverged. Lower the learning "
                "rate (or warm up, clip gradients, keep weights in float32), and begin anew or from a checkpoint before it"
            )
        with stopwatch or nullcontext():
            rows, columns = linear_sum_assignment(costs_)
        found.append((torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)))
    return found


def assign(cost: torch.Tensor):
    return solve([cost])[0]
