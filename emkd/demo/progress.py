"""What the demonstration says while it works: on stderr, a line at least every few seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 4.0  # seconds


def say(text: str) -> None:
    """Print a line."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def timed(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Say what begins and how long it took, and keep the seconds under `name`."""
    say(what)
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)
    say(f"{what}: {seconds[name]} s")


class Steps:
    """Says how far a loop is, at most every EVERY seconds, and at the end of each phase."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, phase: str, step: int, steps: int) -> None:
        if step == steps or time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            say(f"  {phase}: step {step}/{steps}")
