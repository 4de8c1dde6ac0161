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
