"""Figures of README.md and docs/benchmarks.md, as benchmarks/results/*.json has them; and the tables of a page."""

import json
import re
from pathlib import Path
from statistics import mean, median, stdev

from benchmarks.lm.demo.report import NAMES as LM_DEMO_NAMES
from emkd.demo.report import NAMES
from emkd.demo.variants import COSTS

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
    fixed = {name: found[name]["accuracy"] for name in ("teacher", "student-init")}
    return fixed | students


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
        cells = [
            f"{one['bytes']:.0f}", f"{one['regret']:.3f}", f"{100 * one['vsd_error']:.0f}%", f"{one['hidden_cosine']:.3f}",
            f"{one['joint_cosine']:.3f}", f"{one['rld_cosine']:.3f}",
        ]  # fmt: skip
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows


def lm_range():
    by_kind = [raw["settings"]["default"]["bytes"] for raw in results("real_lm")["raw"].values()]
    return f"{min(by_kind):.0f} to {max(by_kind):.0f} bytes"


def lm_width():
    by_kind = [raw["width"] for raw in results("real_lm")["raw"].values()]
    short, middle, full = (mean(kind[w]["bytes"]["0.8"] for kind in by_kind) for w in ("144", "288", "576"))
    return f"the codes alone take {short:.0f} and {middle:.0f} bytes a token, with all 576 {full:.0f}"


def lm_learnt():
    """The share of the dense teacher's gain that is learnt in each kind, with codes and with 64 logits alone."""
    found = results("real_lm")["learnt_by_kind"]
    titles = {"A": "text", "B": "photographs", "C": "mixtures"}
    return [
        ", ".join(f"{found[name][kind]:.2f} ({title})" for kind, title in titles.items()).replace("-", "−")
        for name in ("default", "top 64")
    ]


def lm_places():
    found = results("real_lm")["in_own_block"]["default"]
    return "; ".join(f"{cost} {share:.3f}" for cost, share in found.items())


def lm_headline():
    found = results("real_lm")["real_lm"]
    one, other = found["default"], found["top 64"]
    return (
        f"{one['joint_cosine']:.2f} in {one['bytes']:.0f} bytes a vision token; the top 64 alone "
        f"{other['joint_cosine']:.2f} in {other['bytes']:.0f}"
    )


# docs/demonstration.md. Each of these yields all rows of one of its tables, in order.
DEMO_NAMES = {
    "teacher": "all 64 vision tokens",
    "student-init": "the student after phase 1",
    **{name: words.replace("log-prob.", "log-probabilities") for name, words in NAMES.items()},
}
MATCHED_BY = {
    "random": "at random", "pooled": "pooled", "logits": "raw logits", "log-probabilities": "log-probabilities",
    "logits-top-8": "8 largest logits", "log-probabilities-top-8": "8 largest log-probabilities",
}  # fmt: skip


def standard_error(values):
    return stdev(values) / len(values) ** 0.5


def with_error(values):
    """Accuracies in percent: the mean and its standard error."""
    return f"{100 * mean(values):.1f} ± {100 * standard_error(values):.1f}"


def demo_rows():
    found = results("demo_seeds")["results"]
    yield f"| teacher | {DEMO_NAMES['teacher']} | {100 * found['teacher']['accuracy']:.1f} |"
    yield f"| student-init | {DEMO_NAMES['student-init']} | {100 * found['student-init']['accuracy']:.1f} |"
    for name, entry in found["students"].items():
        yield f"| {name} | {DEMO_NAMES[name]} | {with_error(entry['accuracy'])} |"


def demo_paired_rows():
    for name, entry in results("demo_seeds")["paired_differences"].items():
        yield f"| {name} | {100 * entry['mean']:+.1f} ± {100 * entry['standard_error']:.1f} |"


def lm_demo_rows():
    """docs/demonstration.md: the demonstration around a real language model; no rows until it was run."""
    if not (ROOT / "benchmarks" / "results" / "lm_demo.json").exists():
        return
    found = results("lm_demo")
    yield f"| teacher | all 64 vision tokens | {100 * found['teacher']:.1f} | |"
    yield f"| student-init | the student after phase 1 | {100 * found['student-init']:.1f} | |"
    for name, values in found["students"].items():
        seeds = ", ".join(f"{100 * value:.1f}" for value in values)
        yield f"| {name} | {LM_DEMO_NAMES[name]} | {100 * mean(values):.1f} | {seeds} |"


def demo_pairs_rows():
    found, chosen = results("demo_seeds")["results"]["pairs"], costs_on_validation()
    for matching, title in MATCHED_BY.items():
        cells = [f"{100 * share:.0f}%" for when in ("before", "after") for share in found[when][matching].values()]
        cells.append(with_error(chosen[matching]) if matching in chosen else "")
        yield f"| {title} | {' | '.join(cells)} |".replace("|  |", "| |")


def costs_on_validation():
    """cost of the matching -> accuracies of EM-KD on validation scenes, by seed."""
    found = {}
    for entry in results("demo_choice")["results"]:
        if "losses.cost" in entry["flags"]:
            flags = {name.removeprefix("losses."): value for name, value in entry["flags"].items()}
            found[next(name for name, cost in COSTS.items() if cost == flags)] = entry["accuracy"]
    return found


def demo_weights():
    """EM-KD's accuracy on validation scenes with other weights of VSD."""
    entries = [entry for entry in results("demo_choice")["results"] if set(entry["flags"]) == {"losses.beta"}]
    return ", ".join(f"{with_error(entry['accuracy'])} with {entry['flags']['losses.beta']:g}" for entry in entries)


def demo_condition_rows():
    titles = {
        "demo": "as it is", "all cells": "all eight cells are asked for", "no naming": "vision tokens name nothing",
        "content alone": "vision tokens name contents, not cells",
        "aligned grids": "the student pads, too", "paper's beta": "VSD has the paper's weight, 0.25",
        "right labels": "all labels right",
    }  # fmt: skip
    for name, one in results("demo_conditions")["conditions"].items():
        students = one["students"]
        cells = [f"{100 * mean(students[v]):.1f}" for v in ("sft", "rld", "emkd", "emkd-pooled", "emkd-random")]
        gains = [
            100 * mean(a - b for a, b in zip(students["emkd"], students[v], strict=True))
            for v in ("rld", "emkd-pooled", "emkd-random")
        ]
        yield f"| {titles[name]} | {' | '.join(cells)} | {' | '.join(f'{gain:+.1f}' for gain in gains)} |"


def demo_in_memory_rows():
    found = results("demo_in_memory")
    titles = {
        "dense": ("the teacher in memory", ""),
        "cache": ("a cache of 8 logits and codes", f"{found['bytes']['cache']:.0f}"),
        "top k": (f"a cache of the {found['k']} largest logits alone", f"{found['bytes']['top k']:.0f}"),
    }
    for name, (title, size) in titles.items():
        own, dense = found["accuracy"][name], found["accuracy"]["dense"]  # orders differ: not paired
        error = (standard_error(own) ** 2 + standard_error(dense) ** 2) ** 0.5
        gap = "" if name == "dense" else f"{100 * (mean(own) - mean(dense)):+.1f} ± {100 * error:.1f}"
        yield f"| {title} | {size} | {with_error(found['accuracy'][name])} | {gap} |".replace("|  |", "| |")


def shard_memory_rows():
    """docs/training.md: measured peaks of a rank beside the arithmetic."""
    for name, found in results("shard_memory")["shard_memory"].items():
        head, n_ranks = name.split(", ")
        peak, expected = (found[what] / 2**20 for what in ("peak", "expected"))
        yield f"| {'the embedding' if head == 'tied' else 'its own'} | {n_ranks} | {peak:,.0f} | {expected:,.0f} |"


def vision_share_rows():
    """docs/training.md: the deviation of a gradient with a share of the pairs, and of one of other samples."""
    found = results("vision_share")["vision_share"]
    for name, value in found.items():
        yield f"| {'another 16 samples, with all pairs' if name == 'samples' else name} | {value:.2f} |"
