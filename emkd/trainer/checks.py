"""What is checked before anything is trained: the output folder, the cache, what a resumed run was begun with."""

import json
import sys

from emkd.errors import InputNotFoundError, OutputExistsError, UsageError
from emkd.samples.dataset import Dataset
from emkd.samples.render import writes_end_token
from emkd.storage.cache import Cache
from emkd.trainer.selection import Selection
from emkd.trainer.settings import TrainSettings
from emkd.vlm.identity import image_differences, image_processor_settings
from emkd.vlm.loading import VisionLanguageModel

# What a run was begun with, so that a resumed one cannot be another one.
RUN_NAME = "run.json"


def check_output(settings: TrainSettings) -> str | None:
    """The checkpoint to go on from, None for a new run. Raises OutputExistsError, InputNotFoundError."""
    output = settings.output
    numbered = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    checkpoints = sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    if settings.resume:
        if not checkpoints:
            raise InputNotFoundError(f"--resume: {output} has no checkpoint; start without --resume")
        return str(checkpoints[-1])
    # What a run that failed at its first step left behind is nothing to protect.
    used = output.is_dir() and any(path.name != RUN_NAME for path in output.iterdir())
    if output.is_file() or used:
        raise OutputExistsError(
            f"--output {output} exists and is not empty; name another folder"
            + (", or go on from its last checkpoint with --resume" if checkpoints else "")
        )
    return None


def open_cache(settings: TrainSettings) -> Cache | None:
    """The cache, None where the losses need none. Raises UsageError, CacheError."""
    weights = settings.recipe.losses.weights
    if settings.cache is None:
        if weights.needs_cache:
            raise UsageError(
                f"--cache is missing: only plain fine-tuning (--alpha 1 --beta 0 --gamma 0) works without one, and the "
                f"weights are alpha {weights.alpha}, beta {weights.beta}, gamma {weights.gamma}"
            )
        return None
    cache = Cache.open(settings.cache, partial=settings.partial, window=settings.recipe.window)
    stored = cache.manifest.top_k
    if settings.recipe.losses.top_k is not None and settings.recipe.losses.top_k > stored:
        raise UsageError(f"losses.top_k {settings.recipe.losses.top_k}: the cache stores {stored}")
    if not cache.sealed:
        log(f"{settings.cache} is not sealed: training on the {cache.n_samples} samples that are committed")
    return cache


def note_differences(cache: Cache | None, student: VisionLanguageModel) -> None:
    """What does not stop a run, and should not go unseen."""
    if not writes_end_token(student.processor):
        log("the chat template writes no end token behind answers: the student will not learn where to stop")
    if cache is None:
        return
    differing = image_differences(cache.manifest.image_processor.settings, image_processor_settings(student.processor))
    if differing:
        log(f"student and teacher prepare images differently ({', '.join(differing)}): they may see other pictures")


def agree_with_first_run(
    settings: TrainSettings, cache: Cache | None, selection: Selection | None, dataset: Dataset
) -> None:
    """Writes down what decides this run; a resumed one has to say the same. Raises UsageError naming differences."""
    now = {
        "recipe": settings.recipe.model_dump(mode="json"),
        "cache": None if cache is None else cache.manifest.settings_sha256,
        "samples": None if cache is None or selection is None else selection.sha256(cache),
        "data": dataset.fingerprint,
    }
    path = settings.output / RUN_NAME
    if settings.resume and path.is_file():
        before = json.loads(path.read_text())
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            raise UsageError(
                f"--resume: {', '.join(differing)} of this call is not what {settings.output} was begun with (see "
                f"{path}); give the same, or begin anew in another folder"
            )
        return
    settings.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + "\n")


def log(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
