"""Time and memory of this process, benchmarks in separate processes, and medians. Memory needs Linux and glibc."""

import ctypes
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.provenance import ROOT

MIB = 1 << 20

Figures = dict[str, float]


def reset_peak() -> int:
    """Start counting for `peak`; return the resident size now, in bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed before would hide what is allocated from now on
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the largest resident size of this process since `reset_peak`, in bytes."""
    return _status("VmHWM")


def resident() -> int:
    """Return the resident size of this process now, in bytes."""
    return _status("VmRSS")


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (size,) = (line.split()[1] for line in status if line.startswith(f"{name}:"))
    return int(size) * 1024


def page_faults() -> int:
    """Return how many pages of fresh memory the system has given to this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def seconds(call: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def timed(call: Callable[[], object]) -> Figures:
    """Return wall-clock and CPU seconds of one call, all threads of this process counted."""
    cpu = time.process_time()
    wall = seconds(call)
    return {"seconds": wall, "cpu_seconds": time.process_time() - cpu}


def medians(runs: Sequence[Mapping[str, float]]) -> Figures:
    """Return the median of each figure over the repeats."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def in_process(module: str, *arguments: object) -> Any:
    """Run `python -m module arguments` and return the JSON of the last line that it prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(result.stdout.splitlines()[-1])
