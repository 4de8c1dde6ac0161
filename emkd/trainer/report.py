"""What a training run says on stderr (see display.py). Only the first rank says anything."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from emkd.text import printable_lines
from emkd.trainer.display import Forward, Lines, Position, Terminal, has_terminal

EVERY = 0.2  # seconds between two positions
RECENT = 50  # steps whose mean time is shown


def _to_stderr(text: str) -> None:
    print(printable_lines(text), file=sys.stderr, flush=True)


_display: Lines | None = None


def rank() -> int:
    """Return this process's rank, from the environment that torchrun and Ray Train set; 0 for a single process."""
    return int(environ.get("RANK", "0"))


def display() -> Lines:
    """Return what shows this process's run: a terminal's bar and table, or lines."""
    global _display
    if _display is None:
        _display = Terminal() if has_terminal() else Lines(_to_stderr)
    return _display


def send_to(tell: Callable[[str], object]) -> None:
    """Send all further lines of this process to `tell`, as a worker does to its driver."""
    global _display
    _display = Lines(tell)


def forward_to(put: Callable[[Any], object]) -> None:
    """Send all that this process would show to a process with a terminal, which passes it to `deliver`."""
    global _display
    _display = Forward(put)


def deliver(item: Any) -> None:
    """Show a line, or what `forward_to` has sent."""
    if isinstance(item, str):
        tell(item)
        return
    method, arguments = item
    getattr(display(), method)(*arguments)


def tell(text: str) -> None:
    """Print a line, on any rank."""
    display().line(text)


def log(text: str) -> None:
    """Print a line on the first rank; the other ranks print nothing."""
    if rank() == 0:
        tell(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing while open: what is checked here is checked, and said, again by a rank."""
    global _display
    before, _display = _display, Lines(lambda _: None)
    try:
        yield
    finally:
        _display = before


@contextmanager
def watching() -> Iterator[None]:
    """Leave the terminal as it was at the end, and keep other bars away from this one while open."""
    shows_bar, bars = isinstance(display(), Terminal), logging.is_progress_bar_enabled()
    if shows_bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        display().close()
        if shows_bar and bars:
            logging.enable_progress_bar()


class Watch(TrainerCallback):
    """Shows each of Trainer's logs, and after each step how far the run is.

    The last step is always logged, whatever logging_steps is.

    waiting_share: returns the share of the time since the last log that was spent waiting for data
    """

    def __init__(self, waiting_share: Callable[[], float | None]) -> None:
        self._waiting_share = waiting_share
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._shown = 0.0
        self._loss: float | None = None
        self._waiting: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ends.append(time.monotonic())
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ends.append(time.monotonic())
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self._ends[-1] - self._shown >= EVERY or state.global_step >= state.max_steps:
            self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and state.is_world_process_zero:
            self._loss = logs.get("loss", self._loss)
            self._waiting = logs.get("waiting_share", self._waiting)
            display().numbers(state.global_step, state.max_steps, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            display().close()

    def _show(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._shown = self._ends[-1]
        steps = len(self._ends) - 1
        seconds = (self._ends[-1] - self._ends[0]) / steps if steps else None
        waiting = self._waiting_share()
        self._waiting = self._waiting if waiting is None else waiting
        display().position(
            Position(
                step=state.global_step, n_steps=state.max_steps, seconds=seconds, loss=self._loss, waiting=self._waiting
            )
        )
