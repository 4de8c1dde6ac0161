"""Cache, students, accuracy and pairs, all by emkd's own calls.

A folder of a run:

    data/           scenes as Parquet: align (phase 1, all cells, right answers), train (phase 2, one question each, a
                    quarter of the answers wrong), validation, test
    teacher/        a LLaVA that pads pictures
    student-start/  the teacher's weights, with a processor that stretches pictures
    student-init/   after phase 1: with a quarter of the vision tokens
    cache/          the teacher's cache of data/train.parquet
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm.demo.accuracy import accuracy
from benchmarks.lm.demo.models import load_tokenizer, new_processor
from benchmarks.lm.demo.scenes import Scenes, file_scenes, write_scenes
from benchmarks.lm.demo.sizes import Size
from benchmarks.lm.demo.teacher import train_teacher
from emkd.demo.pairs import Shares, Shown, open_scenes, shares
from emkd.demo.places import places
from emkd.pipeline.job import cache_teacher
from emkd.pipeline.settings import JobSettings
from emkd.storage.cache import Cache
from emkd.trainer import TrainSettings, make_recipe, train_student, with_flags

POOL = 2
WRONG_ANSWERS = 0.25
PAIRED_SCENES = 40
MATCHINGS = ("random", "pooled", "logits", "log-probabilities")
SFT = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
LOSSES = {"alpha": 0.5, "beta": 1.0, "gamma": 25.0}  # beta is 0.25 in the paper
VARIANTS: dict[str, dict[str, Any]] = {
    "sft": SFT,
    "rld": {"beta": 0.0, "gamma": 0.0},
    "emkd": {},
    "emkd-random": {"matching": "random"},
    "rld+vsd": {"gamma": 0.0},
    "emkd-pooled": {"matching": "pooled"},
}


@dataclass(frozen=True)
class Run:
    """A folder, and how much is trained in it."""

    folder: Path
    size: Size

    def make_data(self) -> None:
        """Write data/."""
        align, train, evaluation = self.size.scenes
        data = self.folder / "data"
        write_scenes(data / "align.parquet", align, "align")
        write_scenes(data / "train.parquet", train, "train", questions=1, wrong_answers=WRONG_ANSWERS)
        for split in ("validation", "test"):
            write_scenes(data / f"{split}.parquet", evaluation, split)

    def make_teacher(self) -> dict[str, float]:
        """Write teacher/ and student-start/, and return the losses of the teacher's parts."""
        tokenizer = load_tokenizer()
        losses = train_teacher(self.folder / "teacher", self.size, tokenizer, device())
        shutil.copytree(self.folder / "teacher", self.folder / "student-start")
        new_processor(tokenizer, pads=False).save_pretrained(self.folder / "student-start")
        return losses

    def make_cache(self) -> None:
        """Write cache/."""
        settings = JobSettings(
            teacher=str(self.folder / "teacher"),
            data=str(self.folder / "data" / "train.parquet"),
            cache=str(self.folder / "cache"),
            gpus_per_worker=1 if torch.cuda.is_available() else 0,
            dtype="float32",
            rows_per_shard=60,
            batch_tokens=2048,
        )
        cache_teacher(settings)

    def cache_figures(self) -> dict[str, Any]:
        """Return the samples and bytes of cache/."""
        cache = Cache.open(self.folder / "cache")
        n_bytes = sum(path.stat().st_size for path in (self.folder / "cache").rglob("*") if path.is_file())
        tokens = int(cache.samples["vision_count"].to_numpy().sum())
        return {"samples": cache.n_samples, "bytes": n_bytes, "bytes_per_vision_token": n_bytes / tokens}

    def make_student(self) -> None:
        """Write student-init/ by phase 1, which has no teacher."""
        self._train("student-start", "align", self.folder / "student-init", SFT, phase=0)

    def accuracy_of(self, losses: dict[str, Any], seed: int, split: str) -> float:
        """Train a student of phase 2, and return its accuracy."""
        with tempfile.TemporaryDirectory(prefix="emkd-student-", dir=self.folder) as scratch:
            output = Path(scratch) / "student"
            self._train("student-init", "train", output, losses, phase=1, seed=seed, cache=str(self.folder / "cache"))
            return self.evaluate(output, split)

    def evaluate(self, model: Path | str, split: str) -> float:
        """Return the share of right answers to all questions of a split. model: a folder, or its name in the run's"""
        return accuracy(self.folder / model, self.folder / "data" / f"{split}.parquet")

    def judge_pairs(self) -> Shares:
        """Return the shares of pairs that show the same word and the same cell, before phase 2."""
        data = self.folder / "data" / "train.parquet"
        found = open_scenes(
            self.folder / "student-init", data, self.folder / "cache", min(PAIRED_SCENES, self.size.scenes[1])
        )
        scenes = file_scenes(self.size.scenes[1], "train")
        return shares(found, shown(scenes, pads=False, pool=POOL), shown(scenes, pads=True), MATCHINGS)

    def _train(
        self,
        student: str,
        data: str,
        output: Path,
        losses: dict[str, Any],
        *,
        phase: int,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        flags = {f"losses.{name}": value for name, value in losses.items()} | {"training.seed": seed}
        settings = TrainSettings(
            student=str(self.folder / student),
            data=str(self.folder / "data" / f"{data}.parquet"),
            output=output,
            cache=cache,
            recipe=with_flags(make_recipe(recipe(self.size, phase), "lm_demo"), flags),
        )
        train_student(settings)


def recipe(size: Size, phase: int) -> dict[str, Any]:
    """Return the recipe of phase 1 (phase 0) or 2. The LM head, which is tied to the embeddings, stays as it is."""
    return {
        "losses": LOSSES,
        "student": {"vision_pool": POOL, "freeze": ["lm_head"]},
        "training": {
            "max_steps": size.steps[phase],
            "per_device_train_batch_size": size.batch,
            "learning_rate": size.rates[2 + phase],
            "warmup_steps": size.steps[phase] // 10,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.01,
            "adam_beta2": 0.98,
            "max_grad_norm": 1.0,
            "save_strategy": "no",
        },
        "window": 2,
    }


def shown(scenes: Scenes, *, pads: bool, pool: int = 1) -> Shown:
    """Return what the vision tokens of a model show."""
    cells = places(pads=pads, pool=pool)
    return Shown(cells=cells, contents=scenes.contents(cells))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
