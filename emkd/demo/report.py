"""What the demonstration prints: the table, what it shows and what it does not, and the commands to repeat it."""

import shlex
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from emkd.demo.models import N_VISION_TOKENS
from emkd.demo.regime import ROWS_PER_SHARD, TOP_K
from emkd.demo.variants import RECIPE

NAMES = {
    "sft": "SFT: labels alone",
    "rld": "RLD: the teacher's answers",
    "emkd": "EM-KD: RLD + VSD + VLAD",
    "emkd-random": "EM-KD, matched at random",
    "sft+vlad": "SFT + VLAD",
    "sft+vsd": "SFT + VSD",
    "sft+vsd+vlad": "SFT + VSD + VLAD",
    "rld+vlad": "RLD + VLAD",
    "rld+vsd": "RLD + VSD",
    "emkd-pooled": "EM-KD, matched by pooling",
    "emkd-logits": "EM-KD, cost: logits",
    "emkd-logits-top-8": "EM-KD, cost: 8 largest logits",
    "emkd-log-probabilities-top-8": "EM-KD, cost: 8 largest log-prob.",
}

PAIRED = (
    ("emkd", "sft"), ("emkd", "rld"), ("emkd", "emkd-random"), ("emkd", "emkd-pooled"), ("emkd", "rld+vsd"),
    ("emkd", "sft+vsd+vlad"),
)  # fmt: skip

REGIME = """\
If pairs belong together, a student learns from them what the teacher's answers alone do not teach: compare emkd with
rld and with emkd-random. Over 10 seeds EM-KD is 11.2 points above RLD, and 14.1 above random pairs.
What flatters: SFT learns wrong answers by heart and ends below its start. The student starts as a copy of the teacher.
The regime was looked for on validation scenes: few questions a picture, grids of teacher and student that do not
coincide, and a teacher whose vision tokens were trained to name what they show and where. It is a small task, and no
evidence for large models."""


def table(results: dict[str, Any], out: Path) -> str:
    """Return the whole report of a run."""
    kept = N_VISION_TOKENS // RECIPE["student"]["vision_pool"] ** 2
    lines = [
        f"correct answers on {out}/data/test.parquet (scenes of unseen digits)",
        "",
        f"  {f'teacher, {N_VISION_TOKENS} vision tokens':<36}{100 * results['teacher']['accuracy']:6.1f}%",
        f"  {f'student after phase 1, {kept}':<36}{100 * results['student-init']['accuracy']:6.1f}%",
    ]
    for variant, found in results["students"].items():
        accuracy = found["accuracy"]
        each = " ".join(f"{100 * value:.1f}" for value in accuracy)
        lines.append(f"  {NAMES[variant] + f', {kept}':<36}{100 * mean(accuracy):6.1f}%   seeds: {each}")
    lines += ["", *_differences(results["students"]), "", *_pairs(results["pairs"], out), "", REGIME, ""]
    cache = results["cache"]
    lines.append(
        f"cache: {cache['samples']} samples, {cache['bytes']:,} bytes, {cache['bytes_per_vision_token']:.0f} for each "
        "vision token, indexes included (`emkd inspect` shows the parts)"
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items())
    return "\n".join([*lines, f"time: {seconds}", "", *commands(out)])


def _differences(students: dict[str, Any]) -> list[str]:
    lines = []
    for one, other in PAIRED:
        if one in students and other in students:
            difference, error = paired(students[one]["accuracy"], students[other]["accuracy"])
            spread = f" ± {100 * error:.1f} (standard error)" if error is not None else ""
            lines.append(f"  {one} - {other}: {100 * difference:+.1f} points{spread}, paired by seed")
    return lines


def _pairs(pairs: dict[str, Any], out: Path) -> list[str]:
    lines = [f"matched tokens that show the same content / lie in the same cell (one scene: {out}/pairs.png):"]
    lines += [f"  {'matched by':<26}{'before phase 2':>16}{'after':>12}"]
    for matching, before in pairs["before"].items():
        cells = [
            f"{100 * one['content']:.0f}% / {100 * one['place']:.0f}%" for one in (before, pairs["after"][matching])
        ]
        lines.append(f"  {matching:<26}{cells[0]:>16}{cells[1]:>12}")
    return lines


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean difference by seed, and its standard error (None for a single seed)."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return mean(differences), stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else None


def commands(out: Path) -> list[str]:
    """Return the commands that repeat the cache, the student emkd-0 and its cache's report."""
    folder = {name: shlex.quote(f"{out}/{name}") for name in (
        "teacher", "data/train.parquet", "data/test.parquet", "my-cache", "student-init", "my-student", "recipe.yaml",
    )}  # fmt: skip
    return [
        "To repeat the cache and the student emkd-0 (on one thread: OMP_NUM_THREADS=1):",
        f"  emkd cache-teacher --teacher {folder['teacher']} --data {folder['data/train.parquet']} --cache "
        f"{folder['my-cache']} --top-k {TOP_K} --answer-top-k {TOP_K} --rows-per-shard {ROWS_PER_SHARD} "
        "--gpus-per-worker 0",
        f"  emkd train-student --student {folder['student-init']} --data {folder['data/train.parquet']} --cache "
        f"{folder['my-cache']} --output {folder['my-student']} --recipe {folder['recipe.yaml']} --seed 0 --eval-data "
        f"{folder['data/test.parquet']}",
        f"  emkd inspect {folder['my-cache']}",
    ]
