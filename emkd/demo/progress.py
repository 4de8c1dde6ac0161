"""What the demonstration says while it works: on stderr, a line at least every EVERY seconds."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from emkd.trainer.report import send_to

EVERY = 4.0  # seconds
_said = time.monotonic()  # when the last line was


def say(text: str) -> None:
    """Print a line."""
    global _said
    _said = time.monotonic()
    print(text, file=sys.stderr, flush=True)


@contextmanager
def timed(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Say what begins, that it goes on, and how long it took; keep the seconds under `name`.

    From then on, the lines of training runs count as said.
    """
    say(what)
    started, ended = time.perf_counter(), threading.Event()
    thread = threading.Thread(target=_go_on_saying, args=(what, ended), name="emkd-demo-progress", daemon=True)
    thread.start()
    send_to(say)
    try:
        yield
    finally:
        ended.set()
        thread.join()
    seconds[name] = round(time.perf_counter() - started, 1)
    say(f"{what}: {seconds[name]} s")


def _go_on_saying(what: str, ended: threading.Event) -> None:
    started = time.monotonic()
    while not ended.wait(EVERY / 8):
        if time.monotonic() - _said >= EVERY:
            say(f"  {what}: {time.monotonic() - started:.0f} s so far")


class Steps:
    """Says how far a loop is, at most every EVERY seconds, and at the end of each phase."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, phase: str, step: int, steps: int) -> None:
        if step == steps or time.monotonic() - self._said >= EVERY - 1:
            self._said = time.monotonic()
            say(f"  {phase}: step {step}/{steps}")
