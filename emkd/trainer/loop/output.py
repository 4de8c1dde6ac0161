"""The output folder of a run: empty for a new run, or with the checkpoint that a resumed run continues from."""

from pathlib import Path

from emkd.errors import InputNotFoundError, OutputExistsError, UsageError
from emkd.trainer.loop.checkpoints import checkpoints, has_optimizer, last_complete, step_of
from emkd.trainer.loop.first_run import RUN_NAME
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.report import log, rank

# The recipe that a student was trained by, written beside it as the last file.
RECIPE_NAME = "recipe.yaml"


def check_output(settings: TrainSettings) -> Path | None:
    """Return the checkpoint to resume from, or None to start at the first step.

    Raises OutputExistsError if a new run finds files in --output, and with --resume InputNotFoundError if run.json is
    missing, UsageError if the checkpoint has no optimizer state, DamagedCheckpointError if its files were changed.
    """
    output = settings.output
    if settings.resume:
        if not (output / RUN_NAME).is_file() and output.exists() and any(output.iterdir()):
            raise InputNotFoundError(
                f"--resume: {output} has no {RUN_NAME}, which says what its run was started with. Restore that "
                "file, or start a new run: one of the checkpoints as --student, and another --output"
            )
        checkpoint = last_complete(output, log, verify=rank() == 0)
        if checkpoint is None:
            log(f"{output} has no complete checkpoint: starting at the first step")
            return None
        if not has_optimizer(checkpoint):
            raise UsageError(
                f"--resume: {checkpoint} has no optimizer state (training.save_only_model), so an exact resume is not "
                "possible. To start a new run from its weights, use it as --student, with another --output"
            )
        log(f"resuming from {checkpoint}")
        return checkpoint
    if rank() != 0:  # the first rank checks, and may have written files already
        return None
    if output.is_file() or _used(output):
        raise OutputExistsError(
            f"--output {output} exists and is not empty; name another folder"
            + (", or resume from its last checkpoint with --resume" if checkpoints(output) else "")
        )
    return None


def what_there_is(output: Path) -> str:
    """Say what a run that was stopped has left, and how to go on; true of every run, on every rank."""
    if (output / RECIPE_NAME).is_file():  # written last
        return f"all steps were done, and the trained student is in {output}; what follows (evaluation) was left out"
    checkpoint = last_complete(output, lambda _: None, verify=False)
    if checkpoint is not None:
        return f"{checkpoint} is complete. The same command with --resume goes on after step {step_of(checkpoint)}"
    resumed = " with --resume" if _used(output) else ""
    return f"nothing had been saved. The same command{resumed} starts at the first step"


def _used(output: Path) -> bool:
    """Whether a new run may not use the folder. What failed before its first step leaves run.json, which may go."""
    return output.is_dir() and any(path.name != RUN_NAME for path in output.iterdir())
