"""The output folder of a run: empty for a new run, or with the checkpoint that a resumed run continues from."""

from pathlib import Path

from emkd.errors import InputNotFoundError, OutputExistsError, UsageError
from emkd.trainer.loop.checkpoints import checkpoints, last_complete
from emkd.trainer.loop.first_run import RUN_NAME
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.report import log, rank


def check_output(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from, None to begin. Raises OutputExistsError, InputNotFoundError, UsageError,
    DamagedCheckpointError."""
    output = settings.output
    if settings.resume:
        if not (output / RUN_NAME).is_file() and output.exists() and any(output.iterdir()):
            raise InputNotFoundError(
                f"--resume: {output} has no {RUN_NAME}, so that what its run was begun with is not known; put it back, "
                "or name a checkpoint in it with --student and another folder with --output to begin anew"
            )
        checkpoint = last_complete(output, log, verify=rank() == 0)
        if checkpoint is None:
            log(f"{output} has no complete checkpoint: beginning with the first step")
            return None
        if not (checkpoint / "optimizer.pt").is_file():
            raise UsageError(
                f"--resume: {checkpoint} has no optimizer (training.save_only_model): training cannot go on from it as "
                "if nothing had happened. Name it with --student and another --output to begin anew with its weights"
            )
        log(f"going on from {checkpoint}")
        return checkpoint
    if rank() != 0:  # the first rank has looked, and may be writing already
        return None
    # What a run that failed at its first step left behind is nothing to protect.
    used = output.is_dir() and any(path.name != RUN_NAME for path in output.iterdir())
    if output.is_file() or used:
        raise OutputExistsError(
            f"--output {output} exists and is not empty; name another folder"
            + (", or go on from its last checkpoint with --resume" if checkpoints(output) else "")
        )
    return None
