"""What counts as running out of memory, and how to continue with less.

    results = unless_out_of_memory(lambda: forward(batch))
    if results is None:
        free_memory(device)      # nothing refers to the failed batch any more, so its memory can be freed
        ...                      # try again with half of it

Nothing else is caught here: any other error is a defect or a broken device, and continuing would hide it.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from emkd.errors import SampleError

T = TypeVar("T")

# torch's CPU allocator has no separate error class. "[enforce fail at alloc_cpu.cpp:127] err == 0.
# DefaultCPUAllocator: can't allocate memory: you tried to allocate N bytes. Error code 12 (Cannot allocate memory)"
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
OUT_OF_MEMORY = "out-of-memory"  # the reason of a row that does not fit even alone


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: on a GPU, in Python (NumPy, Pillow, Arrow), in torch on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def unless_out_of_memory(run: Callable[[], T]) -> T | None:
    """Return what `run` returns, or None if memory ran out.

    When None is returned, the error is gone: its traceback holds the frames of `run`, and these hold every tensor of
    the failed attempt. A second attempt inside an `except` block would need memory for both.
    """
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def free_memory(device: torch.device) -> None:
    """Free what nothing refers to any more: reference cycles of Python, and blocks that torch caches."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def rows_that_fit() -> Iterator[None]:
    """While open, turn an error for lack of host memory into a SampleError of the row that is read or encoded."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0]
        raise SampleError(
            OUT_OF_MEMORY,
            f"the row does not fit this machine's main memory ({said or type(error).__name__}); make its images "
            "smaller, or run fewer workers on a machine",
        ) from None
