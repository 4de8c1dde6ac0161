"""`emkd train-student`: one process, or several that Ray Train starts."""

from emkd.errors import UsageError
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.run import train_one_process


def train_student(settings: TrainSettings) -> dict[str, float]:
    """Train a student, save it to `settings.output`, and return the metrics of the run.

    Raises UsageError and its subclasses (TokenizerMismatchError, DataMismatchError, OutputExistsError, ...) before
    training starts, CacheError if the cache is damaged or not sealed, JobFailedError if workers keep dying.
    """
    if settings.address is not None and settings.workers == 1:
        raise UsageError("--address names a Ray cluster for several workers; set their number with --workers")
    if settings.workers > 1:
        from emkd.trainer.workers import train_on_workers  # imports Ray, which one process does not need

        return train_on_workers(settings)
    return train_one_process(settings)
