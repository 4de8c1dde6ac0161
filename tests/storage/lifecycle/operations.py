"""The file-system operations under a folder in order, as Python's audit events report them.

An audit hook sees every open, mkdir, link, rename, remove and rmdir before it happens, so that emkd needs no hook for
its tests. An os.open for reading counts, too, since it precedes an fsync. A hook cannot be removed: use it in a separate
process.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

_CHANGES = {"os.mkdir": -1, "os.link": -1, "os.rename": -1, "os.remove": -1, "os.rmdir": -1}  # index of dir_fd in args
WRITE, SYNC = "write", "sync"
TAKES_SPACE = (WRITE, "os.mkdir", "os.link", "os.rename")


@dataclass(frozen=True)
class Operation:
    """`kind` is WRITE (an open for writing), SYNC (an os.open for reading) or the name of the audit event."""

    kind: str
    path: str


def watch(root: str, act: Callable[[Operation], None]) -> None:
    """From now on, call `act` before every operation on `root` and below, except operations of `act` itself."""
    busy = False

    def hook(event: str, args: tuple) -> None:
        nonlocal busy
        if busy or (event != "open" and event not in _CHANGES):
            return
        operation = _operation(event, args)
        if operation is None or not (operation.path + "/").startswith(root + "/"):
            return
        busy = True
        try:
            act(operation)
        finally:
            busy = False

    sys.addaudithook(hook)


def _operation(event, args):
    path = os.fspath(args[0]) if not isinstance(args[0], int) else None
    if path is None:
        return None
    if event == "open":
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return Operation(WRITE, path)
        return Operation(SYNC, path) if args[1] is None and os.path.isabs(path) else None
    if not os.path.isabs(path):  # shutil.rmtree works from open folders
        path = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), path)
    if event == "os.link" or event == "os.rename":
        path = os.fspath(args[1])
    return Operation(event, path)


def die_at(n: int) -> Callable[[Operation], None]:
    """SIGKILL before the n-th operation, counted from 1."""
    return _at(n, lambda operation, _: os.kill(os.getpid(), signal.SIGKILL))


def die_torn_at(n: int) -> Callable[[Operation], None]:
    """SIGKILL at the n-th open for writing, when the file exists with the first half of its bytes."""

    def tear(operation: Operation, _: int) -> None:
        frame = sys._getframe()
        while "data" not in frame.f_locals:  # the bytes that the product is about to write
            frame = frame.f_back
        data = frame.f_locals["data"]
        with open(operation.path, "xb") as file:
            file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return _at(n, tear, kinds=(WRITE,))


def full_from(n: int, error: int = errno.ENOSPC) -> Callable[[Operation], None]:
    """The n-th operation fails for lack of space, and so does every later operation that takes space."""

    def fail(operation: Operation, count: int) -> None:
        if count == n or operation.kind in TAKES_SPACE:
            raise OSError(error, os.strerror(error), operation.path)

    return _at(n, fail, onwards=True)


def _at(n, act, kinds=None, onwards=False):
    count = 0

    def counting(operation: Operation) -> None:
        nonlocal count
        count += kinds is None or operation.kind in kinds
        if (kinds is None or operation.kind in kinds) and (count >= n if onwards else count == n):
            act(operation, count)

    return counting
