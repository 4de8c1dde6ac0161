"""The folder of temporary files, in which Ray and loader workers make sockets, whose paths may not be long."""

import os
import tempfile

MOST = 107  # bytes of the path of a socket
RAY = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
LOADER = "/pymp-abcdefgh/listener-abcdefgh"


def too_long_for_ray() -> str | None:
    """Say that Ray cannot make its sockets in the folder, and what to do; None if it can."""
    return _too_long(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), RAY)


def too_long_for_loaders() -> str | None:
    """The same of loader workers, which hand over tensors through sockets."""
    return _too_long(tempfile.gettempdir(), LOADER)


def _too_long(folder: str, below: str) -> str | None:
    room = MOST - len(below)
    if len(folder.encode()) <= room:
        return None
    return (
        f"the path of the folder of temporary files has {len(folder.encode())} bytes, and sockets in it leave room for "
        f"{room}: set a shorter TMPDIR, for instance TMPDIR=/tmp (now {folder})"
    )
