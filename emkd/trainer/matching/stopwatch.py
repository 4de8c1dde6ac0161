"""Measures the total time of several intervals, such as the time spent on assignments."""

import time
from dataclasses import dataclass


@dataclass
class Stopwatch:
    """The total time spent in `with stopwatch: ...` blocks, in `seconds`."""

    seconds: float = 0.0
    _started: float = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
