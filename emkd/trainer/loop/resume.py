"""What is checked before anything is trained: the output folder, the cache, what a resumed run was begun with."""

import json
import os
from pathlib import Path
from typing import Any

from emkd.errors import DamagedCheckpointError, InputNotFoundError, OutputExistsError, UsageError
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache
from emkd.trainer.data.selection import Selection
from emkd.trainer.loop.checkpoints import checkpoints, last_complete
from emkd.trainer.recipe.arguments import same_in_effect
from emkd.trainer.recipe.recipe import make_recipe
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.report import log, rank

# What a run was begun with, so that a resumed one cannot be another one.
RUN_NAME = "run.json"

# Fields of `training` that a resumed run may have others of: they move no weight.
FREE = {
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "disable_tqdm", "logging_first_step", "logging_steps", "logging_strategy",
    "log_level", "per_device_eval_batch_size", "project", "report_to", "run_name", "save_steps", "save_strategy",
    "save_total_limit", "skip_memory_metrics", "ddp_timeout",
}  # fmt: skip


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


def agree_with_first_run(
    settings: TrainSettings, cache: Cache | None, selection: Selection | None, dataset: Dataset, n_ranks: int
) -> None:
    """Writes down what decides this run; a resumed one has to say the same. Raises UsageError naming differences."""
    now = {
        "recipe": _deciding(settings.recipe.model_dump(mode="json")),
        "student": settings.student,
        "revision": settings.revision,
        "cache": None if cache is None else cache.manifest.settings_sha256,
        "samples": None if cache is None or selection is None else selection.sha256(cache),
        "data": dataset.fingerprint,
        "evaluation data": _evaluated_on(settings),
        "workers": n_ranks,
    }
    path = settings.output / RUN_NAME
    if settings.resume and path.is_file():
        before = _read(path)
        differing = list(_differences(before, now))
        if differing:
            raise UsageError(
                f"--resume: this call is not what {settings.output} was begun with (see {path}): "
                f"{'; '.join(differing)}. Give the same, or begin anew in another folder"
            )
        return
    if rank() == 0:
        settings.output.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{RUN_NAME}.partial")
        partial.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(partial, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        before: dict[str, Any] = json.loads(path.read_text())
        recipe = make_recipe(before["recipe"], str(path))  # what there was not yet when it was written has its default
        return {**before, "recipe": _deciding(recipe.model_dump(mode="json"))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{path} is not what was written ({error}). Put it back from a copy, or name a checkpoint of the folder "
            "with --student and another folder with --output to begin anew"
        ) from error


def _evaluated_on(settings: TrainSettings) -> str | None:
    """Data that the best checkpoint, or the learning rate, may be chosen by."""
    if settings.eval_data is None or settings.recipe.training.get("eval_strategy", "no") == "no":
        return None
    return Dataset(settings.eval_data, settings.image_root).fingerprint


def _deciding(recipe: dict[str, Any]) -> dict[str, Any]:
    """Without what moves no weight. Of the checkpoints that there are, one may be chosen as the best."""
    free = FREE - ({"save_steps", "save_strategy"} if recipe["training"].get("load_best_model_at_end") else set())
    training = {name: value for name, value in same_in_effect(recipe["training"]).items() if name not in free}
    losses = {name: value for name, value in recipe["losses"].items() if name != "solver"}
    return {**recipe, "losses": losses, "training": training}


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`recipe.losses.alpha was 0.5 and is 0.9`, for each value that differs; hashes are named without their values."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            hashed = name in ("cache", "samples", "data", "evaluation data")
            found.append(f"{prefix}{name} " + ("is another one" if hashed else f"was {old} and is {new}"))
    return found
