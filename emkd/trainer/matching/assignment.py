"""One-to-one assignments of least total cost (Hungarian algorithm), of all images of a batch side by side.

scipy: `scipy.optimize.linear_sum_assignment`, one image a thread. It releases the GIL, so that as many images as there
       are processors are solved at a time. Costs that tell student tokens apart take milliseconds; where all student
       tokens look alike, as before they have learnt anything, the same size takes tens of times as long.
cuda:  the package torch-linear-assignment, all images of one size in one call on the GPU that the costs are on.

Both find a least total cost; where several assignments have it, they may choose different ones.

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
    """(student, teacher) indices [P] for each cost matrix [Ns, Nt], ascending by student, on the costs' device.

    stopwatch: runs while they are solved, not while costs are computed or copied

    Raises TrainingDivergedError where a cost is no finite number.
    """
    if not costs:
        return []
    # All that is left to compute on a device is done, and counted, here.
    if not bool(torch.stack([cost.isfinite().all() for cost in costs]).all()):
        raise TrainingDivergedError(
            "the student's vision logits are infinite or no numbers: the training has diverged. Lower the learning "
            "rate (or warm up, clip gradients, keep weights in float32), and begin anew or from a checkpoint before it"
        )
    if solver == "cuda":
        with stopwatch or nullcontext():
            return solve_batched(costs)
    arrays = [cost.double().cpu().numpy() for cost in costs]
    with stopwatch or nullcontext():
        found = _side_by_side(arrays)
    return [
        (torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device))
        for (rows, columns), cost in zip(found, costs, strict=True)
    ]


def assign(cost: torch.Tensor) -> Pairs:
    """`solve` for one image."""
    return solve([cost])[0]


def _side_by_side(costs: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """In the order of the costs.

    Threads end with the call, so that none is left at exit or missing in a process forked later. To start two takes
    about 0.15 ms, an image of 144 x 729 tokens at least 0.4.
    """
    n_threads = min(len(costs), len(os.sched_getaffinity(0)))
    if n_threads == 1:
        return [linear_sum_assignment(cost) for cost in costs]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(linear_sum_assignment, costs))


def solve_batched(costs: Sequence[torch.Tensor]) -> list[Pairs]:
    """`solve` by torch-linear-assignment, on the device that the costs are on: matrices of one size in one call."""
    from torch_linear_assignment import batch_linear_assignment

    found: dict[int, Pairs] = {}
    for size in dict.fromkeys(cost.shape for cost in costs):
        numbers = [number for number, cost in enumerate(costs) if cost.shape == size]
        columns = batch_linear_assignment(torch.stack([costs[number].double() for number in numbers]))
        for number, column in zip(numbers, columns, strict=True):  # [Ns], -1 for tokens that are left over
            (rows,) = (column >= 0).nonzero(as_tuple=True)
            found[number] = rows, column[rows]
    return [found[number] for number in range(len(costs))]


def check_solver(solver: Solver, device: torch.device) -> None:
    """Raises UsageError where the solver cannot be used for costs on this device."""
    if solver == "scipy":
        return
    # Elsewhere the package would solve one image after the other with SciPy.
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        what = device.type if device.type != "cuda" else torch.cuda.get_device_name(device)
        raise UsageError(
            f"solver cuda needs an NVIDIA GPU of compute capability 8.0 or newer, and this runs on {what}; leave the "
            "solver at scipy"
        )
    try:
        import torch_linear_assignment  # noqa: F401
        import triton  # noqa: F401  without it the package would use SciPy, too
    except ImportError as error:
        raise UsageError(
            f"solver cuda needs the packages torch-linear-assignment and triton ({error}): pip install "
            "'emkd[cuda-assignment]', or leave the solver at scipy"
        ) from error
