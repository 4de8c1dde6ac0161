"""Assignments have the least total cost with every solver, and belong to their own image."""

import importlib.util
import sys
from itertools import permutations
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from emkd.errors import TrainingDivergedError, UsageError
from emkd.trainer.matching import assignment
from emkd.trainer.matching.assignment import assign, check_solver, solve, solve_batched
from emkd.trainer.matching.stopwatch import Stopwatch

SIZES = [(4, 9), (9, 4), (6, 6), (1, 5), (5, 1), (4, 9), (1, 1)]


def matrices(kind: str, device: str = "cpu") -> list[torch.Tensor]:
    """Some of each size; structured ones (products, rows nearly alike) make the algorithm search longest."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for rows, columns in SIZES:
        cost = torch.rand(rows, columns, generator=generator)
        if kind == "product":
            cost = torch.arange(1.0, rows + 1)[:, None] * torch.arange(1.0, columns + 1)
        elif kind == "alike":
            cost = cost[:1] + 1e-3 * torch.rand(rows, columns, generator=generator)
        elif kind == "negative":
            cost = -1e5 * cost
        found.append(cost.to(device))
    return found


def least(cost: torch.Tensor) -> float:
    """By trying all of them, in float64."""
    cost = cost.double().cpu()
    cost = cost.T if cost.shape[0] > cost.shape[1] else cost
    return min(
        sum(float(cost[r, c]) for r, c in enumerate(columns))
        for columns in permutations(range(cost.shape[1]), cost.shape[0])
    )


def check(costs: list[torch.Tensor], pairs: list) -> None:
    for cost, (rows, columns) in zip(costs, pairs, strict=True):
        assert rows.device == columns.device == cost.device
        assert rows.dtype == columns.dtype == torch.int64
        n = min(cost.shape)
        assert len(rows) == len(set(rows.tolist())) == len(set(columns.tolist())) == n
        assert rows.tolist() == sorted(rows.tolist())
        assert float(cost.double()[rows, columns].sum()) == pytest.approx(least(cost), rel=1e-9)


@pytest.mark.parametrize("kind", ["random", "product", "alike", "negative"])
@pytest.mark.parametrize("way", [solve, solve_batched])
def test_total_cost_is_the_least(kind, way):
    costs = matrices(kind)
    check(costs, way(costs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["random", "product", "alike", "negative"])
def test_total_cost_is_the_least_on_a_gpu(kind):
    costs = matrices(kind, "cuda")
    check(costs, solve(costs, "cuda"))
    check(costs, solve(costs, "scipy"))


def test_threads_find_what_one_after_the_other_finds(monkeypatch):
    """Six at a time, also with fewer processors; each image keeps its own."""
    monkeypatch.setattr(assignment.os, "sched_getaffinity", lambda _: set(range(6)))
    generator = torch.Generator().manual_seed(2)
    costs = [torch.rand(20, 50 + n, generator=generator) for n in range(30)]
    for cost, (rows, columns) in zip(costs, solve(costs), strict=True):
        expected = linear_sum_assignment(cost.double().numpy())
        assert (rows.tolist(), columns.tolist()) == (expected[0].tolist(), expected[1].tolist())


def test_images_are_solved_at_the_same_time(monkeypatch):
    """Two that wait for each other: one after the other they would wait for ever."""
    from threading import Barrier

    barrier = Barrier(2, timeout=20)

    def waits(cost):
        barrier.wait()
        return linear_sum_assignment(cost)

    monkeypatch.setattr(assignment.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(assignment, "linear_sum_assignment", waits)
    assert len(solve([torch.rand(3, 4), torch.rand(3, 4)])) == 2


def test_no_images_have_no_pairs():
    assert solve([]) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_costs_that_are_no_numbers(number):
    bad = torch.rand(3, 4)
    bad[1, 2] = number
    with pytest.raises(TrainingDivergedError, match="the training has diverged"):
        solve([torch.rand(3, 4), bad])


def test_the_stopwatch_runs_while_solving():
    stopwatch = Stopwatch()
    solve([torch.from_numpy(np.random.default_rng(0).random((200, 400)))], stopwatch=stopwatch)
    assert stopwatch.seconds > 0


def test_the_cuda_solver_is_refused_where_it_would_run_on_the_cpu():
    """The package would solve one image after the other by SciPy there, and only warn."""
    check_solver("scipy", torch.device("cpu"))
    with pytest.raises(UsageError, match="needs an NVIDIA GPU .* uses cpu; use solver scipy"):
        check_solver("cuda", torch.device("cpu"))


@pytest.mark.parametrize("missing", ["torch_linear_assignment", "triton"])
def test_the_cuda_solver_is_refused_without_its_packages(monkeypatch, missing):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    check_solver("cuda", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"{missing}.*pip install 'emkd\[cuda-assignment\]', or use solver scipy"):
        check_solver("cuda", torch.device("cuda"))


@pytest.mark.parametrize(("capability", "cuda"), [((7, 5), "13.0"), ((9, 0), None)])
def test_the_cuda_solver_is_refused_on_other_gpus(monkeypatch, capability, cuda):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Other GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UsageError, match="compute capability 8.0 or newer, and this run uses Other GPU"):
        check_solver("cuda", torch.device("cuda"))


def test_the_package_is_there_where_it_is_tested():
    assert importlib.util.find_spec("torch_linear_assignment")


def test_one_image():
    cost = matrices("random")[0]
    check([cost], [assign(cost)])
