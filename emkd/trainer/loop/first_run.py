"""The settings that a run was started with (run.json), so that a resumed run uses the same.

run.json    recipe without the fields that do not affect weights, student, revision, workers, and hashes of cache,
            samples and data, and the date that the chat template writes, if it writes one; of a sharded run, the
            samples of a step in place of workers, batch size and accumulation
"""

import json
import os
from pathlib import Path
from typing import Any

from emkd.errors import DamagedCheckpointError, UsageError
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache
from emkd.trainer.data.run_clock import RUN_NAME
from emkd.trainer.data.selection import Selection
from emkd.trainer.recipe.arguments import DEFAULTS, same_in_effect
from emkd.trainer.recipe.recipe import Recipe, make_recipe
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.report import rank

# Fields of `training` that may change when a run is resumed: they do not affect the weights.
FREE = {
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "disable_tqdm", "logging_first_step", "logging_steps", "logging_strategy",
    "log_level", "per_device_eval_batch_size", "project", "report_to", "run_name", "save_steps", "save_strategy",
    "save_on_signal", "save_total_limit", "skip_memory_metrics", "ddp_timeout",
}  # fmt: skip


# They and the number of workers divide the samples of a step. A sharded run may be resumed with another division.
OF_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


def agree_with_first_run(
    settings: TrainSettings,
    cache: Cache | None,
    selection: Selection | None,
    dataset: Dataset,
    n_ranks: int,
    clock: str | None = None,
) -> None:
    """Write what decides this run to run.json, or, when resuming, compare with it.

    n_ranks: the number of workers
    clock: the date that the chat template writes, None if it writes none

    Raises UsageError that lists what differs, DamagedCheckpointError if run.json is not valid.
    """
    has_codes = cache is not None and cache.manifest.codes is not None
    now = {
        "recipe": _deciding(settings.recipe, has_codes),
        "student": settings.student,
        "revision": settings.revision,
        "cache": None if cache is None else cache.manifest.settings_sha256,
        "samples": None if cache is None or selection is None else selection.sha256(cache),
        "data": dataset.fingerprint,
        "evaluation data": _evaluated_on(settings),
        **_workers(settings.recipe, n_ranks),
        **({} if clock is None else {"clock": clock}),
    }
    path = settings.output / RUN_NAME
    if settings.resume and path.is_file():
        before = _read(path, has_codes)
        if clock is not None:
            before.setdefault("clock", clock)  # from before emkd kept it; the user has named it, or the cache keeps it
        differing = list(_differences(before, now))
        about_shards = [line for line in differing if line.startswith("recipe.student.shard ")]
        differing = about_shards or differing  # which changes what else is compared
        if differing:
            raise UsageError(
                f"--resume: this call differs from the one that {settings.output} was started with (see {path}): "
                f"{'; '.join(differing)}. Use the same settings, or start a new run in another folder"
            )
        return
    if rank() == 0:
        settings.output.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{RUN_NAME}.partial")
        partial.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(partial, path)


def _workers(recipe: Recipe, n_ranks: int) -> dict[str, int]:
    """Return what of the number of workers decides a run: of a sharded one, only the samples of a step."""
    if not recipe.student.shard:
        return {"workers": n_ranks}
    training = {**DEFAULTS, "gradient_accumulation_steps": 1, **recipe.training}
    together = n_ranks * training[OF_STEP[0]]
    dropped = {"samples of a micro-batch": together} if training.get("dataloader_drop_last") else {}
    return {"samples of a step": together * training[OF_STEP[1]], **dropped}


def _read(path: Path, has_codes: bool) -> dict[str, Any]:
    try:
        before: dict[str, Any] = json.loads(path.read_text())
        # The cost of runs from before there was a choice; the default is another one since.
        before["recipe"].setdefault("losses", {}).setdefault("cost", "logits")
        recipe = make_recipe(before["recipe"], str(path))  # settings newer than the file have their defaults
        return {**before, "recipe": _deciding(recipe, has_codes)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{path} is damaged ({error}). Restore it from a copy, or start a new run: one of the checkpoints as "
            "--student, and another --output"
        ) from error


def _evaluated_on(settings: TrainSettings) -> str | None:
    """Return the fingerprint of data that may choose the best checkpoint or the learning rate; None if none does."""
    if settings.eval_data is None or settings.recipe.training.get("eval_strategy", "no") == "no":
        return None
    return Dataset(settings.eval_data, settings.image_root, settings.follow_links).fingerprint


def _deciding(whole: Recipe, has_codes: bool) -> dict[str, Any]:
    """Leave out what does not affect the weights, and name the tail that auto stands for.

    Save steps affect them if the best checkpoint is loaded at the end.
    """
    recipe = whole.model_dump(mode="json")
    free = FREE - ({"save_steps", "save_strategy"} if recipe["training"].get("load_best_model_at_end") else set())
    training = {name: value for name, value in same_in_effect(recipe["training"]).items() if name not in free}
    if whole.student.shard:
        training = {name: value for name, value in training.items() if name not in OF_STEP}
    losses = {name: value for name, value in recipe["losses"].items() if name != "solver"}
    losses["tail"] = whole.losses.distance(has_codes=has_codes).tail
    return {**recipe, "losses": losses, "training": training}


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `recipe.losses.alpha was 0.5 and is 0.9` for each value that differs; of hashes, the names alone."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            hashed = name in ("cache", "samples", "data", "evaluation data")
            found.append(f"{prefix}{name} " + ("changed" if hashed else f"was {old} and is {new}"))
    return found
