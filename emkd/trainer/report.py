"""What a training run tells on stderr: plain lines, and one for each of Trainer's logs. Of several ranks the first."""

import os
import sys
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_tell: Callable[[str], object] = _to_stderr


def rank() -> int:
    """This process's, as torchrun and Ray Train say it; 0 where it trains alone."""
    return int(os.environ.get("RANK", "0"))


def send_to(tell: Callable[[str], object]) -> None:
    """Lines of this process go there from now on: a worker's to its driver."""
    global _tell
    _tell = tell


def tell(text: str) -> None:
    """A line, from whichever rank says it."""
    _tell(text)


def log(text: str) -> None:
    """A line from the first rank alone."""
    if rank() == 0:
        _tell(text)


class LogLines(TrainerCallback):
    """One line for each log: step, then each number by its name. The last step has one, whatever logging_steps is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and state.is_world_process_zero:
            numbers = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items())
            log(f"step {state.global_step}/{state.max_steps}: {numbers}")
