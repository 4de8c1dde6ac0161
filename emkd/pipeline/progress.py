"""What the driver tells while a job runs; all of it goes to stderr."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emkd.pipeline.worker import ShardReport


@contextmanager
def progress(n_shards: int) -> Iterator[Callable[[ShardReport], None]]:
    """A bar on a terminal's stderr, a line a shard elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    totals: Counter[str] = Counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=n_shards, text="")

        def show(report: ShardReport) -> None:
            totals.update(samples=report.n_samples, skipped=report.n_skipped, bytes=report.n_bytes)
            text = f"{totals['samples']} samples, {totals['skipped']} skipped, {size_text(totals['bytes'])}"
            bar.update(task, advance=1, text=text)
            if not console.is_terminal:
                log(f"shard {report.number} done in {report.seconds:.1f} s; {text}")

        yield show


def size_text(n_bytes: float) -> str:
    """A size as people read it, in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def log(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr)
