"""`emkd demo`: data, teacher, cache, students, table. Apart from the teacher's training, every step is a public call.

data/         scenes as Parquet: train (few, a quarter of the answers wrong), validation, test
teacher/      a plain LLaVA, trained from random weights in two minutes
student-init/ the teacher's weights; a student pools its vision tokens when it trains
cache/        the teacher's cache, written by the Ray job
students/     <variant>-<seed>/, each with a quarter of the teacher's vision tokens
recipe.yaml   the students' recipe
results.json
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from emkd.demo.models import new_processor, new_student, save_model
from emkd.demo.report import table
from emkd.demo.scenes import write_scenes
from emkd.demo.teacher import train_teacher
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import ABLATIONS, RECIPE, VARIANTS
from emkd.errors import OutputExistsError
from emkd.pipeline import JobSettings
from emkd.pipeline.job import cache_teacher
from emkd.storage.cache import Cache
from emkd.trainer import TrainSettings, evaluate_checkpoint, make_recipe, train_student, with_flags
from emkd.vlm import load

TRAIN_SCENES, EVALUATION_SCENES = 100, 500
WRONG_ANSWERS = 0.25
TOP_K = 8  # of 31 words: a cut cache, as real ones are
DATA_SEED = 1


def run_demo(out: Path, *, seeds: int = 3, ablate: bool = False, address: str | None = None) -> dict[str, Any]:
    """Run the whole demonstration in `out` and return the content of results.json.

    address: of a Ray cluster for the teacher's job that sees the same files; None starts a local one

    Raises OutputExistsError if `out` is a file or a folder that is not empty.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise OutputExistsError(f"--out {out} exists and is not empty; name another folder or remove it")
    with one_quiet_thread():
        seconds: dict[str, float] = {}
        results: dict[str, Any] = {"seconds": seconds}
        make_data(out / "data")
        with _timed(seconds, "teacher", "training a teacher"):
            make_models(out)
            results["teacher"] = _evaluate(out / "teacher", out)
        with _timed(seconds, "cache", "caching the teacher"):
            results["cache"] = cache_demo(out, address)
        with _timed(seconds, "students", "training students"):
            variants = {**VARIANTS, **(ABLATIONS if ablate else {})}
            results["students"] = _students(out, variants, seeds)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results, out))
    return results


def make_data(folder: Path) -> None:
    """Write the three Parquet files. Validation and test scenes show digits that no training scene shows."""
    folder.mkdir(parents=True)
    write_scenes(folder / "train.parquet", TRAIN_SCENES, "train", DATA_SEED, wrong_answers=WRONG_ANSWERS)
    for pool in ("validation", "test"):
        write_scenes(folder / f"{pool}.parquet", EVALUATION_SCENES, pool, DATA_SEED)


def make_models(out: Path) -> None:
    """Write teacher/, recipe.yaml and student-init/, which has the teacher's weights and all its vision tokens."""
    train_teacher(out / "teacher", seed=0)
    student = new_student(load(str(out / "teacher")).model)
    save_model(student, new_processor(), out / "student-init")
    (out / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))


def cache_settings(out: Path, address: str | None = None) -> JobSettings:
    """Return the settings of the demonstration's job."""
    return JobSettings(
        teacher=str(out / "teacher"),
        data=str(out / "data" / "train.parquet"),
        cache=str(out / "cache"),
        top_k=TOP_K,
        answer_top_k=TOP_K,
        logit_error="none",
        gpus_per_worker=0,
        address=address,
        rows_per_shard=25,
    )


def cache_demo(out: Path, address: str | None = None) -> dict[str, Any]:
    """Run the teacher's job over data/train.parquet and return the cache's figures for results.json."""
    cache_teacher(cache_settings(out, address))
    cache = Cache.open(out / "cache")
    n_bytes = sum(path.stat().st_size for path in (out / "cache").rglob("*") if path.is_file())
    vision_tokens = int(cache.samples["vision_count"].to_numpy().sum())
    return {
        "samples": cache.n_samples,
        "bytes": n_bytes,
        "bytes_per_vision_token": n_bytes / vision_tokens,
    }


def _students(out: Path, variants: dict[str, dict[str, Any]], seeds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for variant, losses in variants.items():
        found = []
        for seed in range(seeds):
            folder = out / "students" / f"{variant}-{seed}"
            train_one(out, folder, losses, seed)
            found.append(_evaluate(folder, out))
            _log(f"  {variant} seed {seed}: {100 * found[-1]['accuracy']:.1f}% correct")
        results[variant] = {name: [entry[name] for entry in found] for name in found[0]}
    return results


def train_one(out: Path, folder: Path, losses: dict[str, Any], seed: int, **flags: Any) -> None:
    """Train one student of a variant with the call that `emkd train-student` makes.

    losses: loss weights that override the recipe
    flags:  other overrides of the recipe, by path
    """
    chosen = {f"losses.{name}": value for name, value in losses.items()}
    train_student(
        TrainSettings(
            student=str(out / "student-init"),
            data=str(out / "data" / "train.parquet"),
            output=folder,
            cache=str(out / "cache"),
            recipe=with_flags(make_recipe(RECIPE, "demo"), {**chosen, "training.seed": seed, **flags}),
        )
    )


def _evaluate(folder: Path, out: Path) -> dict[str, float]:
    """Return the accuracy on the test scenes, which no choice depends on."""
    return {"accuracy": evaluate_checkpoint(str(folder), str(out / "data" / "test.parquet"))["accuracy"]}


@contextmanager
def _timed(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    _log(what)
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)
    _log(f"{what}: {seconds[name]} s")


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
