"""One thread that takes what another makes, in the same order, while that goes on: encoding behind the next forward.

    with Behind(writer.add, size_of, held_bytes) as behind:
        for row in teacher.captured(reading):
            behind.put(row)
    # every row has been added by now

Nothing runs on by itself: when the block is left, the thread has ended. What it raised is raised by `put` or at the
end of the block, as it is. An error of the block's own (Ctrl-C, a device that fails) drops what is still waiting.
"""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Behind(Generic[T]):
    """Calls `take` with each item that is put, in a thread of its own.

    size:  bytes of an item
    limit: bytes of the items that are put and not yet taken wholly; `put` waits while there are more. An item that is
        larger by itself is let in when there is no other.
    """

    def __init__(self, take: Callable[[T], object], size: Callable[[T], int], limit: int) -> None:
        self._take, self._size, self._limit = take, size, limit
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._held = 0
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="emkd-behind", daemon=True)

    def __enter__(self) -> "Behind[T]":
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Hands the item over, once there is room for it. Raises what `take` has raised for an earlier one."""
        size = self._size(item)
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._held or self._held + size <= self._limit)
            if self._error is not None:
                raise self._error
            self._held += size
            self._waiting.append(item)
            self._changed.notify_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            if error is not None:
                self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                item = self._waiting.popleft()
            size = self._size(item)
            try:
                self._take(item)
            except BaseException as error:  # noqa: BLE001 - not swallowed: the other thread raises it
                with self._changed:
                    self._error = error
                    self._waiting.clear()
                    self._changed.notify_all()
                return
            del item  # before there is room for another one
            with self._changed:
                self._held -= size
                self._changed.notify_all()
