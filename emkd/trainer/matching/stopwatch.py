"""Adds up seconds, such as those that assignments take."""

import time
from dataclasses import dataclass


@dataclass
class Stopwatch:
    """Adds up the seconds for which it was open: `with stopwatch: ...`."""

    seconds: float = 0.0
    _started: float = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
