"""Figures of README.md and docs/benchmarks.md, as benchmarks/results/*.json has them; and the tables of a page."""

import json
import re
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).parent.parent


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def page(name):
    return (ROOT / name).read_text()


def table_rows(text):
    """The rows of all Markdown tables, without their headers."""
    rows, below = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            below = False
        elif re.fullmatch(r"[|\-: ]+", line) and "---" in line:
            below = True
        elif below:
            rows.append(line)
    return rows


def percent(share):
    return f"{100 * share:.1f}%"


def accuracies():
    """variant -> the teacher's accuracy, or the mean over a student's seeds."""
    found = results("demo_seeds")["results"]
    students = {name: mean(entry["accuracy"]) for name, entry in found["students"].items()}
    return {"teacher": found["teacher"]["accuracy"], **students}


def best_on_validation():
    """variant -> its best mean accuracy over all recipes that were tried."""
    best: dict[str, float] = {}
    for entry in results("demo_choice")["results"]:
        best[entry["variant"]] = max(best.get(entry["variant"], 0), mean(entry["accuracy"]))
    return best


def matching():
    """(milliseconds of the cost matrix, of its LM head, of the dense LM head; seconds of torch.cdist)"""
    seconds = results("matching")["cost"]["against_dense"]["seconds"]
    head, rest = (1e3 * median(run[part] for run in seconds["ours"]) for part in ("lm_head", "rest"))
    return rest, head, 1e3 * median(seconds["lm_head_all_ids"]), median(seconds["cdist"])


LM_NAMES = {
    "error 1.6": "top 8, codes with an error of 1.6",
    "error 0.8": "**top 8, codes with an error of 0.8**",
    "error 0.4": "top 8, codes with an error of 0.4",
    "error 0.2": "top 8, codes with an error of 0.2",
    "equal bytes": "top k alone, in the bytes of 0.8",
    "top 64": "top 64 alone",
    "twice the bytes": "top k alone, in twice the bytes of 0.8",
}


def lm_rows():
    """docs/method.md: what a cache keeps of a real language model."""
    found, rows = results("real_lm")["real_lm"], []
    for name, title in LM_NAMES.items():
        one = found[name]
        learnt = found["default"]["learnt_share"] if name == "error 0.8" else one["learnt_share"]
        cells = [
            f"{one['bytes']:.0f}", f"{one['regret']:.3f}", f"{100 * one['vsd_error']:.0f}%", f"{one['hidden_cosine']:.3f}",
            f"{one['joint_cosine']:.3f}", f"{one['rld_cosine']:.3f}",
            "" if learnt is None else f"{learnt:.2f}".replace("-", "−"),
        ]  # fmt: skip
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows


def lm_width():
    by_kind = [raw["width"] for raw in results("real_lm")["raw"].values()]
    return ", ".join(f"{mean(kind[width]['bytes']['0.8'] for kind in by_kind):.0f}" for width in ("144", "288", "576"))


def lm_places():
    found = results("real_lm")["in_own_block"]["default"]
    return ", ".join(f"{cost} {share:.3f}" for cost, share in found.items())


def lm_headline():
    found = results("real_lm")["real_lm"]
    one, other = found["default"], found["top 64"]
    return (
        f"{one['joint_cosine']:.2f} in {one['bytes']:.0f} bytes a vision token; the top 64 alone "
        f"{other['joint_cosine']:.2f} in {other['bytes']:.0f}"
    )
