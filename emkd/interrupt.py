"""Ctrl-C during work that has to finish: pressed once, it waits for the work; pressed twice, it stops immediately."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """Whether the user has pressed Ctrl-C: then `asked` is True.

    waiting: the work that is finished first, in the words of the message
    """

    def __init__(self, waiting: str) -> None:
        self.waiting, self.asked = waiting, False

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\ninterrupted: {self.waiting}; press Ctrl-C again to stop immediately", file=sys.stderr, flush=True)


@contextmanager
def finish_on_interrupt(waiting: str) -> Iterator[Interrupt]:
    """While open, let the first SIGINT only set `asked` and print what is finished first.

    Python delivers signals to the main thread alone: in another thread, Ctrl-C keeps its meaning.
    """
    interrupt = Interrupt(waiting)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt._handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
