"""One-to-one assignments of least total cost (Hungarian algorithm), for all images of a batch in parallel.

scipy: `scipy.optimize.linear_sum_assignment`, one thread per image. It releases the GIL, so that as many images as
       there are processors are solved at a time. An image takes milliseconds if the costs distinguish its student
       tokens, and tens of times as long if all student tokens look alike, as in an untrained student.
cuda:  the package torch-linear-assignment, all images of one size in one call, on the GPU that holds the costs.

Both find a least total cost. If several assignments have it, they may choose different ones.

Shape legend: Ns, Nt vision tokens of one image in student and teacher, P = min(Ns, Nt) matched pairs
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from emkd.errors import TrainingDivergedError, UsageError
from emkd.trainer.matching.stopwatch import Stopwatch

Solver = Literal["scipy", "cuda"]
SOLVERS: tuple[str, ...] = get_args(Solver)

Pairs = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def solve(costs: Sequence[torch.Tensor], solver: Solver = "scipy", stopwatch: Stopwatch | None = None) -> list[Pairs]:
    """Return (student, teacher) indices [P] for each cost matrix [Ns, Nt], ascending by student, on the costs' device.

    stopwatch: runs while assignments are solved, not while costs are computed or copied

    Raises TrainingDivergedError if a cost is not finite.
    """
    if not costs:
        return []
    # This waits for the device to finish computing the costs, before the stopwatch starts.
    if not bool(torch.stack([cost.isfinite().all() for cost in costs]).all()):
        raise TrainingDivergedError(
            "the student's vision logits are infinite or NaN: the training has diverged. Lower the learning rate (or "
            "warm up, clip gradients, keep weights in float32), and start again or from an earlier checkpoint"
        )
    if solver == "cuda":
        with stopwatch or nullcontext():
            return solve_batched(costs)
    arrays = [cost.double().cpu().numpy() for cost in costs]
    with stopwatch or nullcontext():
        found = _in_threads(arrays)
    return [
        (torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device))
        for (rows, columns), cost in zip(found, costs, strict=True)
    ]


def assign(cost: torch.Tensor) -> Pairs:
    """Return `solve` of one cost matrix [Ns, Nt], by SciPy."""
    return solve([cost])[0]


def _in_threads(costs: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the assignments in the order of the costs.

    The threads end with the call, so that none is left at exit, and none is missing in a process forked later. Two
    threads start in about 0.15 ms; an image of 144 x 729 tokens takes at least 0.4 ms.
    """
    n_threads = min(len(costs), len(os.sched_getaffinity(0)))
    if n_threads == 1:
        return [linear_sum_assignment(cost) for cost in costs]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(linear_sum_assignment, costs))


def solve_batched(costs: Sequence[torch.Tensor]) -> list[Pairs]:
    """Return `solve` of costs [Ns, Nt] by torch-linear-assignment, on their device; equal sizes go in one call."""
    from torch_linear_assignment import batch_linear_assignment

    found: dict[int, Pairs] = {}
    for size in dict.fromkeys(cost.shape for cost in costs):
        numbers = [number for number, cost in enumerate(costs) if cost.shape == size]
        columns = batch_linear_assignment(torch.stack([costs[number].double() for number in numbers]))
        for number, column in zip(numbers, columns, strict=True):  # [Ns], -1 for tokens without a pair
            (rows,) = (column >= 0).nonzero(as_tuple=True)
            found[number] = rows, column[rows]
    return [found[number] for number in range(len(costs))]


def check_solver(solver: Solver, device: torch.device) -> None:
    """Raise UsageError if the solver cannot be used for costs on this device."""
    if solver == "scipy":
        return
    # On other devices the package would solve one image after the other with SciPy.
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        what = device.type if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise UsageError(
            f"solver cuda needs an NVIDIA GPU of compute capability 8.0 or newer, and this run uses {what}; use solver "
            "scipy"
        )
    try:
        import torch_linear_assignment  # noqa: F401
        import triton  # noqa: F401  without it the package would use SciPy, too
    except ImportError as error:
        raise UsageError(
            f"solver cuda needs the packages torch-linear-assignment and triton ({error}): pip install "
            "'emkd[cuda-assignment]', or use solver scipy"
        ) from error
