"""From the cache as with the teacher in memory: students of the demonstration, trained in three ways.

    python -m benchmarks.demo.in_memory DEMO_OUT --seeds 6

DEMO_OUT is a folder that `emkd demo` made; the script uses its student after phase 1. Accuracies are on the test
scenes.

    dense   the teacher in memory, all of its logits: a plain loop over step/dense.py, which is written directly from
            the paper and uses nothing of emkd's trainer; order of the scenes, optimizer and schedule are its own. Its
            matching compares log-probabilities, as the trainer's does by default
    cache   `emkd train-student` from the demonstration's cache (8 logits and codes)
    top k   `emkd train-student` from a cache of the k largest logits alone, with the least k that takes as many bytes

Writes benchmarks/results/demo_in_memory.json.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_cosine_schedule_with_warmup

from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.demo.students import accuracy
from benchmarks.step.dense import dense_losses, views
from emkd.demo.models import WORDS
from emkd.demo.regime import TOP_K
from emkd.demo.run import cache_settings, evaluate
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import RECIPE
from emkd.inspection.report.summary import summarize
from emkd.pipeline.job import cache_teacher
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded, Encoder
from emkd.storage.cache import Cache
from emkd.vlm import load
from emkd.vlm.forward import collate
from emkd.vlm.loading import VisionLanguageModel


def train_dense(demo: Path, folder: Path, seed: int) -> None:
    """Train a student with the teacher in memory and save it."""
    torch.manual_seed(seed)
    training, losses = RECIPE["training"], RECIPE["losses"]
    teacher, student = load(str(demo / "teacher")), load(str(demo / "student-init"))
    own, theirs = _encoded(demo, student), _encoded(demo, teacher)
    size, steps = training["per_device_train_batch_size"], training["max_steps"]
    optimizer = torch.optim.AdamW(
        student.model.parameters(),
        lr=training["learning_rate"],
        betas=(training["adam_beta1"], training["adam_beta2"]),
        weight_decay=training["weight_decay"],
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, training["warmup_steps"], steps)
    student.model.train()
    teacher.model.eval()
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(own)).tolist()
        batch, order = order[:size], order[size:]
        with torch.no_grad():
            known = _views(teacher, [theirs[i] for i in batch])
        chosen = [own[i] for i in batch]
        answers = [item.text_ids[item.answer_positions] for item in chosen]
        found = dense_losses(
            _views(student, chosen), known, answers,
            alpha=losses["alpha"], beta=losses["beta"], gamma=losses["gamma"], log_probabilities=True,
        )  # fmt: skip
        optimizer.zero_grad()
        found.total.backward()
        clip_grad_norm_(student.model.parameters(), training["max_grad_norm"])
        optimizer.step()
        schedule.step()
    student.model.save_pretrained(folder)
    student.processor.save_pretrained(folder)
    for code in (demo / "student-init").glob("*.py"):  # the class of a model that pools
        shutil.copy(code, folder)


def _encoded(demo: Path, vlm: VisionLanguageModel) -> list[Encoded]:
    dataset, encoder = Dataset(str(demo / "data" / "train.parquet")), Encoder(vlm.processor, vlm.image_token_id)
    return [encoder(dataset.sample(row)) for row in range(dataset.n_rows)]


def _views(vlm: VisionLanguageModel, items: list[Encoded]) -> Any:
    return views(vlm.model, collate(items, 0), items, len(WORDS))


def dense_accuracy(demo: Path, seed: int) -> float:
    with tempfile.TemporaryDirectory(prefix="emkd-dense-") as folder:
        train_dense(demo, Path(folder), seed)
        return evaluate(Path(folder), demo)["accuracy"]


def bytes_of_a_token(folder: Path) -> float:
    """Return the bytes that a cache keeps of a vision token's distribution: ids, logits, tails and codes."""
    by_array: dict[str, float] = summarize(Cache.open(folder))["bytes_per_vision_token"]
    return sum(size for name, size in by_array.items() if name.startswith("vision_"))


def cache_at_equal_bytes(demo: Path, folder: Path) -> int:
    """Write the cache of the least k whose logits take at least the bytes of the demonstration's logits and codes.

    folder: gets what a student needs;  returns k
    """
    wanted = bytes_of_a_token(demo / "cache")
    for name in ("data", "student-init", "teacher"):
        shutil.copytree(demo / name, folder / name)
    for k in range(TOP_K, len(WORDS) + 1):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        cache_teacher(replace(cache_settings(folder), top_k=k, answer_top_k=k, logit_error="none"))
        if bytes_of_a_token(folder / "cache") >= wanted:
            return k
    raise RuntimeError(f"all {len(WORDS)} logits take fewer than {wanted:.1f} bytes a vision token: nothing to compare")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    origin, seeds = provenance(), range(arguments.seeds)
    with one_quiet_thread(), tempfile.TemporaryDirectory(prefix="emkd-equal-") as scratch:
        k = cache_at_equal_bytes(arguments.demo, Path(scratch))
        found: dict[str, list[float]] = {
            "dense": [dense_accuracy(arguments.demo, seed) for seed in seeds],
            "cache": [accuracy(arguments.demo, {}, seed, split="test") for seed in seeds],
            "top k": [accuracy(Path(scratch), {}, seed, split="test") for seed in seeds],
        }
        n_bytes = {
            "cache": bytes_of_a_token(arguments.demo / "cache"),
            "top k": bytes_of_a_token(Path(scratch) / "cache"),
        }
    print({name: mean(each) for name, each in found.items()}, k, n_bytes)
    write_results(
        RESULTS / "demo_in_memory.json",
        {**origin, "split": "test", "k": k, "bytes": n_bytes, "accuracy": found},
    )


if __name__ == "__main__":
    main()
