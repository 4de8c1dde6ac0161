"""What counts as out of memory, with real errors if a machine without a GPU can provoke them."""

import gc
import weakref

import numpy as np
import pytest
import torch

from emkd.errors import SampleError
from emkd.pipeline.out_of_memory import free_memory, is_out_of_memory, rows_that_fit, unless_out_of_memory

ABSURD = 1 << 50


def provoke(run):
    with pytest.raises(Exception) as caught:  # noqa: PT011  which class it is, is what is asked
        run()
    return caught.value


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.empty(ABSURD),
        lambda: torch.zeros(1).expand(ABSURD).contiguous(),
        lambda: torch.nn.functional.pad(torch.ones(1), (0, ABSURD)),
        lambda: torch.ones(1 << 24, 1) @ torch.ones(1, 1 << 24),
        lambda: torch.UntypedStorage(ABSURD),
        lambda: np.empty(ABSURD),
        lambda: bytearray(ABSURD),
    ],
    ids=["empty", "copy", "pad", "matmul", "storage", "numpy", "python"],
)
def test_real_failures_to_allocate(run):
    assert is_out_of_memory(provoke(run))


def test_that_of_a_gpu():
    """The class that torch raises on CUDA; it cannot be provoked without one."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_something_else(error):
    assert not is_out_of_memory(error)


def test_what_torch_says_of_a_size_that_is_no_size():
    assert not is_out_of_memory(provoke(lambda: torch.empty(1 << 62)))


def test_nothing_of_the_attempt_is_left():
    """Without the collector of cycles: the tensors go with the frames of the traceback, at once."""
    seen = []

    def attempt():
        tensor = torch.ones(1000)
        seen.append(weakref.ref(tensor))
        torch.empty(ABSURD)
        return tensor

    gc.disable()
    try:
        assert unless_out_of_memory(attempt) is None
        assert seen[0]() is None
    finally:
        gc.enable()


def test_results_and_other_errors_pass():
    assert unless_out_of_memory(lambda: 5) == 5
    with pytest.raises(RuntimeError, match="must match"):
        unless_out_of_memory(lambda: torch.ones(3) + torch.ones(4))
    with pytest.raises(SampleError, match="no-answer"):
        unless_out_of_memory(lambda: (_ for _ in ()).throw(SampleError("no-answer", "none")))


def test_cycles_are_freed():
    class Node:
        pass

    gc.disable()
    try:
        node = Node()
        node.itself, node.tensor = node, torch.ones(10)
        kept = weakref.ref(node.tensor)
        del node
        assert kept() is not None
        free_memory(torch.device("cpu"))
        assert kept() is None
    finally:
        gc.enable()


def test_a_row_that_does_not_fit_is_an_error_of_that_row():
    with pytest.raises(SampleError, match=r"out-of-memory: .*Unable to allocate 8.00 PiB") as caught, rows_that_fit():
        np.empty(ABSURD)
    assert caught.value.reason == "out-of-memory"
    with pytest.raises(SampleError, match=r"\(MemoryError\)"), rows_that_fit():
        raise MemoryError
    with pytest.raises(SampleError, match="no-answer"), rows_that_fit():
        raise SampleError("no-answer", "none")
    with pytest.raises(RuntimeError, match="must match"), rows_that_fit():
        torch.ones(3) + torch.ones(4)
