"""What a training run logs to stderr: plain lines, and one for each of Trainer's logs. Only the first rank logs."""

import os
import sys
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from emkd.text import printable_lines


def _to_stderr(text: str) -> None:
    print(printable_lines(text), file=sys.stderr, flush=True)


_tell: Callable[[str], object] = _to_stderr


def rank() -> int:
    """Return this process's rank, from the environment that torchrun and Ray Train set; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def send_to(tell: Callable[[str], object]) -> None:
    """Send all further lines of this process to `tell`, as a worker does to its driver."""
    global _tell
    _tell = tell


def tell(text: str) -> None:
    """Print a line, on any rank."""
    _tell(text)


def log(text: str) -> None:
    """Print a line on the first rank; the other ranks print nothing."""
    if rank() == 0:
        _tell(text)


class LogLines(TrainerCallback):
    """Prints one line for each of Trainer's logs: the step, then each number with its name.

    The last step is always logged, whatever logging_steps is.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and state.is_world_process_zero:
            numbers = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items())
            log(f"step {state.global_step}/{state.max_steps}: {numbers}")
