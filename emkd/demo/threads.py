"""One thread for the demonstration: small models on several threads that wait for each other are many times slower."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, and restore the number of threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_quiet_thread() -> Iterator[None]:
    """Run on one thread, in processes that start later too, without progress bars of transformers."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    transformers_logging.disable_progress_bar()
    try:
        with one_thread():
            yield
    finally:
        transformers_logging.enable_progress_bar()
