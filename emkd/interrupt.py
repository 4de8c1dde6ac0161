"""SIGINT (Ctrl-C) and SIGTERM during work that has to finish: once, they wait for the work; twice, they stop at once.

SIGINT raises KeyboardInterrupt, as Python's own handler does; SIGTERM raises Terminated, where `raising_on_sigterm` or
`finish_on_interrupt` is open. `exit_code` is 130 for the one and 143 for the other.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# torchrun passes each signal on to its processes, which a terminal has sent the same signal already.
TORCHRUN = "TORCHELASTIC_RUN_ID"
TORCHRUN_SECONDS = 2.0

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which what runs a job in a cluster sends to end it."""


def exit_code(stopped: KeyboardInterrupt) -> int:
    """Return 143 for SIGTERM, else 130: 128 and the number of the signal, as shells have it."""
    return 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


def again(number: int) -> str:
    """Return what to do to stop at once, after a first signal."""
    return "press Ctrl-C again" if number == signal.SIGINT else f"send {NAMES[number]} again"


class Interrupt:
    """Whether a signal has come: then `asked` is True, and `signal` is its number.

    announce: says what is finished first; called once, with the number of the signal
    finished: set once that is done and the process is about to end: further signals have nothing to stop
    """

    def __init__(self, announce: Callable[[int], object]) -> None:
        self.announce, self.signal, self.finished = announce, 0, False
        self._first = 0.0

    @property
    def asked(self) -> bool:
        return self.signal != 0

    def ask(self, number: int) -> None:
        """Take the first signal; raise the error of a second one."""
        if self.finished:
            return
        if self.asked:
            if TORCHRUN in os.environ and time.monotonic() - self._first < TORCHRUN_SECONDS:
                return
            raise error_of(number)
        self.signal, self._first = number, time.monotonic()
        self.announce(number)

    def error(self) -> KeyboardInterrupt:
        """Return the error of the signal that came."""
        return error_of(self.signal)

    def _handle(self, number: int, frame: Any) -> None:
        self.ask(number)


def error_of(number: int) -> KeyboardInterrupt:
    """Return what a signal raises."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def finish_on_interrupt(waiting: str) -> Iterator[Interrupt]:
    """While open, let the first signal only set `asked` and print what is finished first.

    waiting: the work that is finished first, in the words of the message
    """

    def announce(number: int) -> None:
        print(f"\ninterrupted: {waiting}; {again(number)} to stop immediately", file=sys.stderr, flush=True)

    interrupt = Interrupt(announce)
    with by_signals(interrupt):
        yield interrupt


@contextmanager
def by_signals(interrupt: Interrupt) -> Iterator[None]:
    """While open, pass SIGINT and SIGTERM to an Interrupt.

    Python delivers signals to the main thread alone: in another thread, they keep their meaning.
    """
    with _handlers({number: interrupt._handle for number in NAMES}):
        yield


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """While open, SIGTERM raises Terminated in the main thread, so that a command can end as it does after Ctrl-C."""

    def handle(number: int, frame: Any) -> None:
        raise Terminated

    with _handlers({signal.SIGTERM: handle}):
        yield


@contextmanager
def _handlers(handlers: dict[int, Callable[[int, Any], None]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
