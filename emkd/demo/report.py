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
What it shows: pairs that belong together, and what is learnt from them, bring what the teacher's answers alone do not.
Over 10 seeds EM-KD is X points above RLD and Y above EM-KD with random pairs (benchmarks/results/demo_seeds.json).
What flatters: SFT learns the wrong answers by heart and ends below its own start, so compare with RLD. The regime was
looked for on validation scenes: few questions a picture, grids of teacher and student that do not coincide, and a
teacher whose vision tokens were trained to name what they show, which large language models do by themselves.
docs/demonstration.md takes each condition away in turn. It is a small task, and no evidence for large models."""


def table(results: dict[str, Any], out: Path) -> str:
    """Return the whole report of a run."""
    lines = [
        f"correct answers on {out}/data/test.parquet (scenes of unseen digits)",
        "",
        f"  {'teacher, 64 vision tokens':<36}{100 * results['teacher']['accuracy']:6.1f}%",
        f"  {'student after phase 1, 16':<36}{100 * results['student-init']['accuracy']:6.1f}%",
    ]
    for variant, found in results["students"].items():
        accuracy = found["accuracy"]
        each = " ".join(f"{100 * value:.1f}" for value in accuracy)
        lines.append(f"  {NAMES[variant] + ', 16':<36}{100 * mean(accuracy):6.1f}%   seeds: {each}")
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
    lines += [f"  {'matched by':<26}{'before':>14}{'after':>18}  training"]
    for matching in pairs["before"]:
        cells = [" / ".join(f"{100 * share:.0f}%" for share in pairs[when][matching].values()) for when in pairs]
        lines.append(f"  {matching:<26}{cells[0]:>14}{cells[1]:>18}")
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
        "--top-k 8 --answer-top-k 8 --gpus-per-worker 0",
        f"  emkd train-student --student {out}/student-init --data {out}/data/train.parquet --cache {out}/my-cache "
        f"--output {out}/my-student --recipe {out}/recipe.yaml --eval-data {out}/data/test.parquet",
        f"  emkd inspect {out}/my-cache",
    ]
