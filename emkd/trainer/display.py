"""How a training run shows itself: plain lines, or on a terminal one bar below a table that fits its width.

Lines      `step 25/300: loss 4.42, sup 4.6, ...`, one line for each of Trainer's logs
Terminal   a row of a table for each log, and a bar: steps, seconds a step, time left, loss, share of waiting
Forward    sends what it is given to another process, which shows it
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from emkd.text import printable_lines
from emkd.units import time_text

HEADER_EVERY = 30  # rows
BAR = (6, 40)  # characters, least and most
Numbers = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is.

    seconds: mean of the last steps, evaluations and checkpoints included; None before the first
    loss:    of the last log;  waiting: share of the time spent waiting for data
    """

    step: int
    n_steps: int
    seconds: float | None = None
    loss: float | None = None
    waiting: float | None = None

    def text(self, width: int) -> str:
        """Return what fits into some characters, the most useful first."""
        parts = []
        if self.seconds is not None:
            parts += [f"{time_text((self.n_steps - self.step) * self.seconds)} left", f"{self.seconds:.3g} s/step"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.waiting is not None:
            parts.append(f"waiting {100 * self.waiting:.0f}%")
        while parts and len(", ".join(parts)) > width:
            parts.pop()
        return ", ".join(parts)


class Lines:
    """Plain lines. tell: prints one"""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell

    def line(self, text: str) -> None:
        """Show a line."""
        self._tell(text)

    def numbers(self, step: int, n_steps: int, numbers: Numbers) -> None:
        """Show one of Trainer's logs."""
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        self.line(f"step {step}/{n_steps}: {shown}")

    def position(self, position: Position) -> None:
        """Show how far the run is; lines do not."""

    def close(self) -> None:
        """Leave the terminal as it was."""


@dataclass(frozen=True)
class Column:
    """A column of the table. width: characters, the space before it included"""

    title: str
    key: str
    width: int
    of: Callable[[Any], str] = "{:#.4g}".format


# The most useful first: what does not fit the terminal is left out from the end.
COLUMNS = (
    Column("loss", "loss", 8),
    Column("sup", "sup", 8),
    Column("rld", "rld", 8),
    Column("vsd", "vsd", 8),
    Column("vlad", "vlad", 9),
    Column("rate", "learning_rate", 9, "{:.2e}".format),
    Column("wait", "waiting_share", 6, "{:.0%}".format),
    Column("samples/s", "samples_per_second", 11, "{:.3g}".format),
    Column("skipped", "skipped_rows", 9, "{:.0f}".format),
    Column("gradient", "grad_norm", 10, "{:.3g}".format),
    Column("pairs", "matched_pairs", 8),
    Column("mass", "retained_mass", 7, "{:.3f}".format),
)
STEP_WIDTH = 8


def columns_for(numbers: Numbers, width: int) -> list[Column]:
    """Return the columns of a row that fit into some characters."""
    found, left = [], width - STEP_WIDTH
    for column in COLUMNS:
        if column.key in numbers and column.width <= left:
            found.append(column)
            left -= column.width
    return found


class Terminal(Lines):
    """A table and a bar. console: of a terminal"""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(self._print)
        self.console = console or Console(stderr=True)
        self._bar = BarColumn()
        self._progress: Progress | None = None
        self._task: Any = None
        self._header: list[Column] = []
        self._rows = 0

    def _print(self, text: str) -> None:
        self.console.print(printable_lines(text), highlight=False, markup=False)

    def numbers(self, step: int, n_steps: int, numbers: Numbers) -> None:
        if "loss" not in numbers:
            super().numbers(step, n_steps, numbers)
            self._header = []
            return
        columns = columns_for(numbers, self.console.width)
        if columns != self._header or self._rows % HEADER_EVERY == 0:
            self._header, self._rows = columns, 0
            self.console.print("step".rjust(STEP_WIDTH) + "".join(c.title.rjust(c.width) for c in columns), style="dim")
        self._rows += 1
        self._print(str(step).rjust(STEP_WIDTH) + "".join(c.of(numbers[c.key]).rjust(c.width) for c in columns))

    def position(self, position: Position) -> None:
        if self._progress is None:
            steps = TextColumn("step {task.completed}/{task.total}")
            self._progress = Progress(steps, self._bar, TextColumn("{task.fields[text]}"), console=self.console)
            self._task = self._progress.add_task("steps", total=position.n_steps, text="")
            self._progress.start()
        room = self.console.width - len(f"step {position.n_steps}/{position.n_steps}") - 3
        text = position.text(room - BAR[0])
        self._bar.bar_width = max(BAR[0], min(BAR[1], room - len(text)))
        self._progress.update(self._task, completed=position.step, total=position.n_steps, text=text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Forward(Lines):
    """Sends each call to another process. put: takes (name of a method, its arguments)"""

    def __init__(self, put: Callable[[tuple[str, tuple[Any, ...]]], object]) -> None:
        super().__init__(lambda text: put(("line", (text,))))
        self._put = put

    def numbers(self, step: int, n_steps: int, numbers: Numbers) -> None:
        self._put(("numbers", (step, n_steps, dict(numbers))))

    def position(self, position: Position) -> None:
        self._put(("position", (position,)))


def has_terminal() -> bool:
    """Whether stderr can show a bar."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"
