"""Ctrl-C while shards are being captured: once finishes those in hand, twice stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emkd.pipeline.progress import log


class Interrupt:
    """`asked` is True once the user wants the job to stop."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log("\ninterrupted: finishing the shards in hand; Ctrl-C again stops at once")


@contextmanager
def finish_on_interrupt() -> Iterator[Interrupt]:
    """While open, the first SIGINT only sets `asked`. Python delivers signals to the main thread alone: in another
    one Ctrl-C stays what it is."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt._handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
