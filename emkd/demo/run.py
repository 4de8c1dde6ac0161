"""`emkd demo`: data, teacher, cache, students, table. Apart from the teacher's training, every step is a public call.

data/           scenes as Parquet: align (phase 1), train (phase 2: one question each, a quarter of the answers wrong),
                validation, test
teacher/        a LLaVA that pads images, trained from random weights
student-start/  the teacher's weights, with a processor that stretches images
student-init/   after phase 1: with a quarter of the vision tokens
cache/          the teacher's cache of data/train.parquet, written by the Ray job
students/       <variant>-<seed>/, after phase 2
align.yaml, recipe.yaml   the recipes of the two phases
pairs.png       matched tokens of one scene
results.json
"""

import json
import time
from pathlib import Path
from typing import Any

import yaml

from emkd.demo.models import new_processor, new_student, save_model
from emkd.demo.pairs import Shares, Shown, open_scenes, shares
from emkd.demo.picture import draw_pairs, scene_image
from emkd.demo.progress import Steps, say, timed
from emkd.demo.regime import (
    ALIGN_SCENES,
    DEMO,
    EVALUATION_SCENES,
    ROWS_PER_SHARD,
    TOP_K,
    TRAIN_SCENES,
    Regime,
)
from emkd.demo.report import table
from emkd.demo.scenes import file_scenes, write_scenes
from emkd.demo.teacher import train_teacher
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import ABLATIONS, ALIGN, COSTS, DEFAULT_COST, RECIPE, VARIANTS
from emkd.errors import OutputExistsError
from emkd.pipeline import JobSettings
from emkd.pipeline.job import cache_teacher
from emkd.storage.cache import Cache
from emkd.trainer import TrainSettings, evaluate_checkpoint, make_recipe, train_student, with_flags
from emkd.vlm import load

DATA_SEED, ALIGN_SEED = 1, 2
EVALUATION_SEEDS = {"validation": 3, "test": 1}  # of the same seed, they would have the same cells empty
PAIRED_SCENES = 100  # whose pairs are judged
MATCHINGS = ("random", "pooled", *COSTS)


def run_demo(out: Path, *, seeds: int = 3, ablate: bool = False, address: str | None = None) -> dict[str, Any]:
    """Run the whole demonstration in `out` and return the content of results.json.

    address: of a Ray cluster for the teacher's job that sees the same files; None starts a local one

    Raises OutputExistsError if `out` is a file or a folder that is not empty.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise OutputExistsError(f"--out {out} exists and is not empty; name another folder or remove it")
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {"seconds": seconds}
    started = time.perf_counter()
    with one_quiet_thread():
        say("drawing scenes")
        make_data(out / "data")
        with timed(seconds, "teacher", "training a teacher"):
            make_teacher(out)
            results["teacher"] = evaluate(out / "teacher", out)
        with timed(seconds, "cache", "caching the teacher"):
            results["cache"] = cache_demo(out, address)
        with timed(seconds, "phase 1", "training a student without the teacher: phase 1"):
            make_student(out)
            results["student-init"] = evaluate(out / "student-init", out)
        with timed(seconds, "students", "training students: phase 2"):
            variants = {**VARIANTS, **(ABLATIONS if ablate else {})}
            results["students"] = _students(out, variants, seeds)
        with timed(seconds, "pairs", "judging pairs"):
            before, after = out / "student-init", out / "students" / "emkd-0"
            results["pairs"] = {"before": judge_pairs(out, before), "after": judge_pairs(out, after)}
            picture(out, after)
    seconds["total"] = round(time.perf_counter() - started, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results, out))
    return results


def make_data(folder: Path, regime: Regime = DEMO) -> None:
    """Write the four Parquet files. Validation and test scenes show digits that no training scene shows."""
    write_scenes(folder / "align.parquet", ALIGN_SCENES, "train", ALIGN_SEED)
    write_scenes(
        folder / "train.parquet", TRAIN_SCENES, "train", DATA_SEED,
        questions=regime.questions, wrong_answers=regime.wrong_answers,
    )  # fmt: skip
    for pool, seed in EVALUATION_SEEDS.items():
        write_scenes(folder / f"{pool}.parquet", EVALUATION_SCENES, pool, seed)


def make_teacher(out: Path, regime: Regime = DEMO) -> None:
    """Write teacher/."""
    train_teacher(out / "teacher", seed=0, naming=regime.naming, name=regime.name, on_step=Steps())


def make_student(out: Path, regime: Regime = DEMO) -> None:
    """Write the recipes, student-start/, and student-init/ by phase 1."""
    (out / "align.yaml").write_text(yaml.safe_dump(ALIGN, sort_keys=False))
    (out / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    student = new_student(load(str(out / "teacher")).model)
    save_model(student, new_processor(pads=regime.aligned), out / "student-start")
    train_student(
        TrainSettings(
            student=str(out / "student-start"),
            data=str(out / "data" / "align.parquet"),
            output=out / "student-init",
            recipe=make_recipe(ALIGN, "demo: phase 1"),
        )
    )


def cache_settings(out: Path, address: str | None = None) -> JobSettings:
    """Return the settings of the demonstration's job."""
    return JobSettings(
        teacher=str(out / "teacher"),
        data=str(out / "data" / "train.parquet"),
        cache=str(out / "cache"),
        top_k=TOP_K,
        answer_top_k=TOP_K,
        gpus_per_worker=0,
        address=address,
        rows_per_shard=ROWS_PER_SHARD,
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
            say(f"  {variant} seed {seed}")
            train_one(out, folder, losses, seed)
            found.append(evaluate(folder, out))
            say(f"  {variant} seed {seed}: {100 * found[-1]['accuracy']:.1f}% correct")
        results[variant] = {name: [entry[name] for entry in found] for name in found[0]}
    return results


def train_one(out: Path, folder: Path, losses: dict[str, Any], seed: int, regime: Regime = DEMO, **flags: Any) -> None:
    """Train one student of a variant with the call that `emkd train-student` makes.

    losses: what of the recipe's section `losses` the variant overrides
    flags:  other overrides of the recipe, by path
    """
    train_student(
        TrainSettings(
            student=str(out / "student-init"),
            data=str(out / "data" / "train.parquet"),
            output=folder,
            cache=str(out / "cache"),
            recipe=with_flags(make_recipe(RECIPE, "demo"), {**regime.flags(losses), "training.seed": seed, **flags}),
        )
    )


def evaluate(folder: Path, out: Path, split: str = "test") -> dict[str, float]:
    """Return the accuracy on a file of scenes. No choice depends on the test scenes."""
    return {"accuracy": evaluate_checkpoint(str(folder), str(out / "data" / f"{split}.parquet"))["accuracy"]}


def judge_pairs(out: Path, student: Path, regime: Regime = DEMO) -> Shares:
    """Return the shares of pairs that belong together, in the first scenes of the cache, for each of MATCHINGS."""
    found = open_scenes(student, out / "data" / "train.parquet", out / "cache", PAIRED_SCENES)
    return shares(found, *_shown(slice(PAIRED_SCENES), regime), MATCHINGS)


def picture(out: Path, student: Path) -> None:
    """Draw the pairs of the cache's first scene as pairs.png, with the recipe's cost."""
    data = out / "data" / "train.parquet"
    (scene,) = open_scenes(student, data, out / "cache", 1)
    own, theirs = _shown(slice(1), DEMO)
    drawn = draw_pairs(scene_image(data, 0), DEMO.aligned, scene, DEFAULT_COST, own, theirs)
    drawn.save(out / "pairs.png")


def _shown(some: slice, regime: Regime) -> tuple[Shown, Shown]:
    """What the tokens of student and teacher show in some of the training scenes."""
    scenes = file_scenes(TRAIN_SCENES, "train", DATA_SEED)[some]
    own = Shown.of(scenes, pads=regime.aligned, pool=RECIPE["student"]["vision_pool"])
    return own, Shown.of(scenes, pads=True)
