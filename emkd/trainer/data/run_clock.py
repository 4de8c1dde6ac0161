"""The date that a run without a cache writes into its rows, if its chat template writes one.

With a cache, that date is the cache's. Without one, the run that is started asks for it once, run.json keeps it, and a
run that is resumed on another day goes on with it.
"""

import json

import torch

from emkd.clock import clock, today
from emkd.errors import UsageError
from emkd.trainer.recipe.settings import TrainSettings

# What a run was started with (`loop/first_run.py`).
RUN_NAME = "run.json"


def run_clock(settings: TrainSettings) -> str:
    """Return the named date, that of the run that is resumed, or today's, the same on all ranks.

    Raises UsageError for a resumed run whose run.json was written before emkd kept the date.
    """
    if settings.clock is not None:
        return clock(settings.clock)
    if settings.resume and (settings.output / RUN_NAME).is_file():
        return _of_first_run(settings)
    return _same_on_all_ranks(today())


def _of_first_run(settings: TrainSettings) -> str:
    path = settings.output / RUN_NAME
    try:
        kept = json.loads(path.read_text()).get("clock")
    except (ValueError, AttributeError):
        kept = ""  # damaged: whoever compares the settings with it says so
    if kept is None:
        raise UsageError(
            f"--resume: the student's chat template writes the date (strftime_now), and {path} was written before emkd "
            "kept it. Name the day on which the run was started with --clock YYYY-MM-DD"
        )
    return str(kept)


def _same_on_all_ranks(date: str) -> str:
    """Return what the first rank says: at midnight, ranks would disagree."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return date
    held = [date]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
