"""When memory runs out: what counts as that, and how to go on with less.

    results = unless_out_of_memory(lambda: forward(batch))
    if results is None:
        free_memory(device)      # the failed batch is gone by now, so that there is something to free
        ...                      # try again with half of it

Nothing else is caught here: any other error is a defect or a broken device, and going on would hide it.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from emkd.errors import SampleError

T = TypeVar("T")

# torch's CPU allocator has no error class of its own. "[enforce fail at alloc_cpu.cpp:127] err == 0.
# DefaultCPUAllocator: can't allocate memory: you tried to allocate N bytes. Error code 12 (Cannot allocate memory)"
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
OUT_OF_MEMORY = "out-of-memory"  # the reason of a row that does not fit by itself


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: on a GPU, in Python (NumPy, Pillow, Arrow), in torch on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def unless_out_of_memory(run: Callable[[], T]) -> T | None:
    """What `run` returns, or None where memory ran out.

    By the time that None is there, the error is gone: its traceback has the frames of `run`, and these have every
    tensor of the failed attempt. Trying again inside of an `except` block would need memory for both.
    """
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def free_memory(device: torch.device) -> None:
    """Gives back what nobody refers to any more: cycles of Python, and blocks that torch keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def rows_that_fit() -> Iterator[None]:
    """While open, a row whose reading or encoding runs out of the host's memory is a SampleError like any other."""
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
