"""Measuring cases on the devices that this machine has."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

NOT_MEASURED = "not measured"


def measure_cases(names: Iterable[str], measure_case: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Return `measure_case(name, device)` of each case. `gpu` runs on a GPU, or is NOT_MEASURED without one."""
    found: dict[str, Any] = {}
    for name in names:
        if name != "gpu":
            found[name] = measure_case(name, "cpu")
        else:
            found[name] = measure_case(name, "cuda") if torch.cuda.is_available() else NOT_MEASURED
    return found
