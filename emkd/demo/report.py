"""What the demonstration prints: the table, what it shows and what it does not, and the commands to repeat it."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

NAMES = {
    "sft": "SFT: labels alone",
    "rld": "RLD: the teacher's answers",
    "emkd": "EM-KD: RLD + VSD + VLAD",
    "sft+vsd": "SFT + VSD",
    "sft+vlad": "SFT + VLAD",
    "rld+vsd": "RLD + VSD",
    "rld+vlad": "RLD + VLAD",
    "emkd-pooled": "EM-KD, matched by pooling",
    "emkd-random": "EM-KD, matched at random",
}

PAIRED = (("emkd", "sft"), ("emkd", "rld"), ("emkd", "emkd-random"), ("emkd", "emkd-pooled"))

REGIME = """\
The regime: 100 labelled scenes, a quarter of whose answers are wrong, and students that start from the teacher's
own projector and language model with a quarter of its vision tokens. Labels are few and noisy, so the teacher helps
much, almost entirely through its answers (RLD): over 10 seeds VSD, VLAD and the choice of the matching changed
accuracy by at most 0.3 points on top of RLD (benchmarks/results/demo_seeds.json). Distillation did not help in two
regimes: with all labels right, SFT alone came within a point of EM-KD; and with a student whose projector and
language model started from random weights, no variant solved the task in twice the steps
(benchmarks/results/demo_regimes.json). All variants share one recipe, the best one for EM-KD on the validation
scenes: 97.0% there, and 92.4% for SFT at its own best (benchmarks/results/demo_choice.json). The models are so small
that the likeliest words of their vision tokens mean nothing."""


def table(results: dict[str, Any], out: Path) -> str:
    """Return the whole report of a run."""
    lines = [
        f"correct answers on {out}/data/test.parquet (scenes of unseen digits)",
        "",
        f"  {'teacher, 64 vision tokens':<34}{100 * results['teacher']['accuracy']:6.1f}%",
    ]
    for variant, found in results["students"].items():
        accuracy = found["accuracy"]
        each = " ".join(f"{100 * value:.1f}" for value in accuracy)
        lines.append(f"  {NAMES[variant] + ', 16':<34}{100 * mean(accuracy):6.1f}%   seeds: {each}")
    lines += ["", *_differences(results["students"]), "", REGIME, ""]
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


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean difference by seed, and its standard error (None for a single seed)."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return mean(differences), stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else None


def commands(out: Path) -> list[str]:
    """Return the commands that repeat caching, training and inspecting."""
    return [
        "To repeat these steps yourself:",
        f"  emkd cache-teacher --teacher {out}/teacher --data {out}/data/train.parquet --cache {out}/my-cache "
        "--top-k 8 --answer-top-k 8 --logit-error none --gpus-per-worker 0",
        f"  emkd train-student --student {out}/student-init --data {out}/data/train.parquet --cache {out}/my-cache "
        f"--output {out}/my-student --recipe {out}/recipe.yaml --eval-data {out}/data/test.parquet",
        f"  emkd inspect {out}/my-cache",
    ]
