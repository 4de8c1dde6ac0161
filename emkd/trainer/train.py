"""`emkd train-student`: one process, or several that Ray Train starts."""

from emkd.errors import StoppedError, UsageError
from emkd.interrupt import NAMES, exit_code
from emkd.trainer.loop.output import what_there_is
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.run import train_one_process


def train_student(settings: TrainSettings) -> dict[str, float]:
    """Train a student, save it to `settings.output`, and return the metrics of the run.

    Raises UsageError and its subclasses (TokenizerMismatchError, DataMismatchError, OutputExistsError, ...) before
    training starts, CacheError if the cache is damaged or not sealed, JobFailedError if workers keep dying,
    StoppedError after SIGINT (Ctrl-C) or SIGTERM: once, they save a checkpoint after the step in hand; twice, or before
    the first step, they stop at once.
    """
    if settings.address is not None and settings.workers == 1:
        raise UsageError("--address names a Ray cluster for several workers; set their number with --workers")
    try:
        if settings.workers > 1:
            from emkd.trainer.workers import train_on_workers  # imports Ray, which one process does not need

            return train_on_workers(settings)
        return train_one_process(settings)
    except KeyboardInterrupt as stopped:
        code = exit_code(stopped)
        what = f"stopped at once by {NAMES[code - 128]}: {what_there_is(settings.output)}"
        raise StoppedError(what, code) from None
