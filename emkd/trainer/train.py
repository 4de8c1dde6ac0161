"""`emkd train-student`: one process, or several that Ray Train starts."""

from emkd.errors import UsageError
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.run import train_one_process


def train_student(settings: TrainSettings) -> dict[str, float]:
    """Trains and saves a student to `settings.output`; returns the metrics of the run.

    Raises UsageError and its kin (TokenizerMismatchError, DataMismatchError, OutputExistsError, ...) before
    anything is trained, CacheError where the cache is damaged or not sealed, JobFailedError where workers keep dying.
    """
    if settings.address is not None and settings.workers == 1:
        raise UsageError("--address names a cluster for several workers; say how many with --workers")
    if settings.workers > 1:
        from emkd.trainer.workers import train_on_workers  # Ray is needed for this alone

        return train_on_workers(settings)
    return train_one_process(settings)
