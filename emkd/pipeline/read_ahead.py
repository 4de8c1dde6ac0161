"""The rows of a worker's next shard, read while the teacher works on the current shard."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from emkd.background import BackgroundCall
from emkd.pipeline.row_reader import RowReader


@dataclass(frozen=True)
class _Started:
    """A shard that a thread reads."""

    number: int
    rows: RowReader
    thread: BackgroundCall[None]


class ReadAhead:
    """Reads the next shard in a background thread, one shard at a time.

        rows = ahead.take(number)        # the rows that a thread has read already, if one was started
        rows.advance()                   # reads the remaining rows
        ahead.start(number + 1)
        ...                              # the teacher's passes over `rows`

    rows_of: the rows of a shard, none of them read
    limit:   bytes that may be held of the next shard

    An error while reading ahead is raised by `take` for that shard only.
    """

    def __init__(self, rows_of: Callable[[int], RowReader], limit: int) -> None:
        self._rows_of, self._limit = rows_of, limit
        self._started: _Started | None = None

    def start(self, number: int) -> None:
        """Start reading a shard. Raises ValueError if the previous shard was not taken."""
        if self._started is not None:
            raise ValueError(f"shard {self._started.number} was started and not taken")
        rows = self._rows_of(number)
        thread = BackgroundCall(partial(rows.advance, self._limit), "emkd-read-ahead", daemon=False)
        self._started = _Started(number, rows, thread)

    def take(self, number: int) -> RowReader:
        """The rows of a shard, as far as they are read; no thread reads any more.

        Another shard that was started is dropped: another worker captures it.
        """
        started, self._started = self._started, None
        if started is not None and started.number == number:
            started.thread.result()
            return started.rows
        if started is not None:
            started.rows.stopped = True
            started.thread.wait()  # an error of this shard is raised by the worker that captures it
        return self._rows_of(number)
