"""Background threads that all start, fail and end in the same way.

    call = BackgroundCall(trainer.fit, "emkd-ray-train")       # one call; started here
    result = call.result()                                     # what it returned, or raised

    with BackgroundConsumer(writer.add, size_of, held_bytes, "emkd-write") as consumer:
        for row in teacher.captured(reading):                  # the writer encodes a row during the next pass
            consumer.put(row)
    # every row has been added by now

An exception of a thread is raised once, unchanged, in the thread that waits for it. Threads wait in short intervals, so
that Ctrl-C takes effect.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar, cast

T = TypeVar("T")

POLL_SECONDS = 0.1


class BackgroundCall(Generic[T]):
    """One call in its own thread, which starts immediately.

    name:   of the thread
    daemon: whether the program may end while the call runs
    """

    def __init__(self, call: Callable[[], T], name: str, *, daemon: bool = True) -> None:
        self._call: Callable[[], T] | None = call
        self._returned: T | None = None
        self._error: BaseException | None = None
        self._taken = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=daemon)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the call has ended and its thread is gone.

        timeout: seconds after which it returns False; None waits as long as it takes
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ended.wait(POLL_SECONDS):
            if deadline is not None and time.monotonic() >= deadline:
                return False
        self._thread.join()
        return True

    def result(self) -> T:
        """Wait, and return what the call returned or raise what it raised. Call it once.

        The error is not kept: its traceback has the caller's frame, which has this object, and all that the failed
        call held would stay in memory until Python looks for cycles.
        """
        self.wait()
        if self._taken:
            raise ValueError(f"the result of the thread {self._thread.name} was taken before")
        self._taken = True
        error, self._error = self._error, None
        returned, self._returned = self._returned, None
        try:
            if error is not None:
                raise error
            return cast(T, returned)
        finally:
            del error

    def _run(self) -> None:
        call, self._call = self._call, None
        try:
            assert call is not None
            self._returned = call()
        except BaseException as error:  # noqa: BLE001 - not swallowed: `result` raises it in the thread that waits
            self._error = error
        finally:
            del call
            self._ended.set()


class BackgroundConsumer(Generic[T]):
    """A thread that calls `take` with each item that is put, in the same order, while the `with` block is open.

    size:  bytes of an item
    limit: bytes of the items that are put and not yet fully taken; `put` waits while there are more. An item that is
        larger than the limit is accepted if there is no other.

    The thread ends before the block does. An exception of `take` is raised by `put` or at the end of the block.
    An error of the block itself (Ctrl-C, a device that fails) drops the items that are still waiting, and hides an
    error of `take`.
    """

    def __init__(self, take: Callable[[T], object], size: Callable[[T], int], limit: int, name: str) -> None:
        self._take, self._size, self._limit, self._name = take, size, limit, name
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._held = 0
        self._closed = self._stopped = False

    def __enter__(self) -> "BackgroundConsumer[T]":
        self._thread = BackgroundCall(self._run, self._name)
        return self

    def put(self, item: T) -> None:
        """Hand the item over once there is room for it. Raises what `take` has raised for an earlier one."""
        if self._closed:
            raise ValueError(f"the thread {self._name} has ended: its block was left")
        size = self._size(item)

        def ready() -> bool:
            return self._stopped or not self._held or self._held + size <= self._limit

        with self._changed:
            while not self._changed.wait_for(ready, POLL_SECONDS):
                pass
            if not self._stopped:
                self._held += size
                self._waiting.append(item)
                self._changed.notify_all()
                return
        self._thread.result()  # it stopped before its block was left: this raises

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            if error is not None:
                self._waiting.clear()
            self._changed.notify_all()
        self._thread.wait()
        if error is None:
            self._thread.result()

    def _run(self) -> None:
        try:
            while self._take_next():
                pass
        finally:
            with self._changed:
                self._stopped = True
                self._waiting.clear()
                self._changed.notify_all()

    def _take_next(self) -> bool:
        """Take one item. False if there is none and none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return False
            item = self._waiting.popleft()
        size = self._size(item)
        self._take(item)
        del item  # before there is room for another one
        with self._changed:
            self._held -= size
            self._changed.notify_all()
        return True
