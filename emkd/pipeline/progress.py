"""What the driver logs while a job runs; all of it goes to stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from emkd.pipeline.worker import ShardReport
from emkd.text import printable_lines
from emkd.units import size_text, time_text

EXCESS = 1.1  # of a predicted error
LINE_SECONDS = 5.0  # without a terminal, at most one line per this many seconds


@dataclass
class JobProgress:
    """What is done so far, of `n_shards` shards with `n_rows` rows, since `started` (seconds of a monotonic clock)."""

    n_shards: int
    n_rows: int
    shards: int = 0
    samples: int = 0
    skipped: int = 0
    halved: int = 0
    shared: int = 0
    different: int = 0
    n_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, report: ShardReport) -> None:
        self.shards += 1
        self.samples += report.n_samples
        self.skipped += report.n_skipped
        self.halved += report.n_halved
        self.shared += report.n_shared
        self.different += report.n_different
        self.n_bytes += report.n_bytes

    @property
    def rows(self) -> int:
        return self.samples + self.skipped

    def describe(self, now: float) -> str:
        """Rows, rate, time left, bytes, skipped rows."""
        seconds = max(now - self.started, 1e-9)
        rate = self.rows / seconds
        left = (self.n_rows - self.rows) / rate if rate else 0.0
        parts = [
            f"{self.rows:,} of {self.n_rows:,} rows",
            f"{rate:.3g} rows/s",
            f"{time_text(left)} left",
            size_text(self.n_bytes),
            f"{self.skipped:,} skipped",
        ]
        if self.halved:
            parts.append(f"{self.halved:,} in batches halved for lack of memory: try a smaller --batch-tokens")
        if self.shared:
            parts.append(f"{self.shared:,} images shared with other rows")
        if self.different:
            parts.append(
                f"{self.different:,} images not shared although they follow the same text: this teacher's vision "
                "tokens depend on more than that"
            )
        return ", ".join(parts)


@contextmanager
def progress(n_shards: int, n_rows: int, logit_error: float | None = None) -> Iterator[Callable[[ShardReport], None]]:
    """Show a progress bar if stderr is a terminal, and log lines otherwise. Yields what to call after a shard.

    logit_error: predicted, of logits that are read from codes; a shard that exceeds it is named
    """
    console = Console(stderr=True)
    totals, last_line = JobProgress(n_shards, n_rows), -LINE_SECONDS
    columns = (TextColumn("{task.completed}/{task.total} shards"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=n_shards, text=f"{n_rows:,} rows")

        def show(report: ShardReport) -> None:
            nonlocal last_line
            totals.add(report)
            warning = too_large_error(report, logit_error)
            if warning:
                bar.console.print(warning, soft_wrap=True, highlight=False, markup=False)
            now = time.monotonic()
            text = totals.describe(now)
            bar.update(task, completed=totals.shards, text=text)
            due = now - last_line >= LINE_SECONDS or totals.shards == n_shards
            if not console.is_terminal and due:
                last_line = now
                log(f"{totals.shards} of {n_shards} shards: {text}")

        yield show


def too_large_error(report: ShardReport, predicted: float | None) -> str | None:
    """Say that the logits of a shard, read from codes, have a clearly larger error than predicted; None if not."""
    measured = report.logit_error
    if predicted is None or measured is None or measured.root <= EXCESS * predicted:
        return None
    return (
        f"warning: shard {report.number}: logits read from codes have an error of {measured.root:.3g}, and "
        f"{predicted:.3g} was predicted: its rows differ from those that the basis was made from. They stay usable "
        "with this error; if many shards have it, make the cache again with a smaller --logit-error"
    )


def log(text: str) -> None:
    """Print one line to stderr."""
    print(printable_lines(text), file=sys.stderr, flush=True)
