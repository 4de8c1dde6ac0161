"""Resident memory of this process. Linux with glibc alone."""

import ctypes
import resource
from pathlib import Path


def reset_peak() -> int:
    """From now on `peak` counts; returns the resident size now, bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would hide what is taken from now on
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Largest resident size of this process since `reset_peak`, bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    (size,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
    return int(size) * 1024


def page_faults() -> int:
    """Pages of fresh memory that this process has had from the system so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
