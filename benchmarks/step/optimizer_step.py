"""Time and memory of an optimizer step: fine-tuning, EM-KD from a cache, EM-KD with the teacher in memory.

    python -m benchmarks.step.optimizer_step       # demo, cpu-larger, cpu-real, and gpu if there is one
    python -m benchmarks.step.optimizer_step --cases tiny --output step.json
    python -m benchmarks.step.optimizer_step --cases cpu-real --variants cache codes --output step_codes.json

Five variants take steps in turn, on the same student and the same batch (cases.py):

    sft     Sup alone, the LM head on answer tokens alone
    cache   EM-KD, the teacher's records read from a cache of the top k logits alone
    codes   EM-KD, the teacher's records read from a cache of 8 logits and codes
    dense   EM-KD with the teacher in memory, written directly from the paper (dense.py)
    live    EM-KD with the teacher in memory and emkd's losses; the step computes the teacher's top-k

A step is forward, teacher if in memory, losses, backward, clipping, AdamW. The learning rate is 0, so that all steps
are equal. What precedes the step is "waiting for data" and timed separately: images, tokens, and in `cache` a shard of
the batch's size, read, checked and decoded. No worker reads ahead, and files are in the page cache.

Memory is measured over two steps in a separate process, weights and optimizer state included: on a CPU the largest
resident size from the time the models exist, minus the size before; on a GPU torch's max_memory_allocated.

First the losses of `cache`, `dense` and `live` are compared on the demonstration's pair at k = V. Writes
benchmarks/results/step.json; `step_ratio` has ratios of medians.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common.devices import NOT_MEASURED, measure_cases
from benchmarks.common.measuring import MIB, Figures, in_process, medians, peak, reset_peak
from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.step.cases import CASES, ROWS_NAME, Case, write_cache, write_codes
from benchmarks.step.variants import VARIANTS, Steps

LOSSES = ("sup", "rld", "vsd", "vlad")
RATIOS = {
    "cache/sft": ("cache", "sft"),
    "codes/cache": ("codes", "cache"),
    "dense teacher/cache": ("dense", "cache"),
    "teacher with our losses/cache": ("live", "cache"),
}


def prepare(case: Case, folder: Path, device: str) -> None:
    """Write the case's rows and their cache into an empty folder."""
    case.write_rows(folder / ROWS_NAME)
    teacher = case.teacher(device)
    write_cache(case, folder, teacher)
    if "codes" in case.variants and case.top_k:
        write_codes(case, folder, teacher)


def agreement(case: Case, device: str = "cpu") -> dict[str, float]:
    """Return the largest relative difference of each loss between `dense` and, at k = V, `cache` and `live`.

    Raises RuntimeError above 1e-4: the variants would not compute the same losses.
    """
    with tempfile.TemporaryDirectory(prefix="emkd-step-") as scratch:
        prepare(case.uncut(), Path(scratch), device)
        steps = Steps(case.uncut(), Path(scratch), device, ("cache", "dense", "live"))
        found = {variant: steps.step(variant, steps.load(variant)) for variant in ("cache", "dense", "live")}
    differences = {
        name: max(abs(found[variant][name] / found["dense"][name] - 1) for variant in ("cache", "live"))
        for name in LOSSES
    }
    if max(differences.values()) > 1e-4:
        raise RuntimeError(f"the losses of one step differ by more than 1e-4 between variants: {found}")
    return differences


def times(case: Case, folder: Path, device: str) -> dict[str, list[Figures]]:
    """Return raw repeats of all variants, measured in turn; the first round of each is dropped.

    Raises RuntimeError if a loss changes by more than 1%.
    """
    steps = Steps(case, folder, device, case.variants)
    found: dict[str, list[Figures]] = {variant: [] for variant in case.variants}
    for number in range(case.rounds + 1):
        for variant in case.variants:
            if variant == "dense" and number > case.dense_rounds:
                continue
            run = steps.timed(variant)
            if number:
                found[variant].append(run)
    for variant, runs in found.items():
        for name in LOSSES:
            first, last = runs[0][name], runs[-1][name]
            if abs(first - last) > 1e-2 * abs(first):
                raise RuntimeError(f"{variant}: {name} changed from {first} to {last}; expected equal steps")
    return found


def memory_here(variant: str, case: Case, folder: Path, device: str) -> int:
    """Return the bytes that two steps of a variant take in this process, which must not have done anything else.

    Steps of a small pair come first, so that memory that libraries allocate once is not counted.
    """
    with tempfile.TemporaryDirectory(prefix="emkd-step-") as scratch:
        prepare(CASES["tiny"], Path(scratch), device)
        small = Steps(CASES["tiny"], Path(scratch), device, VARIANTS)
        for each in VARIANTS:
            small.step(each, small.load(each))
        del small
    gc.collect()
    before = reset_peak()
    steps = Steps(case, folder, device, (variant,))
    reset_peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second step starts with the optimizer's state in memory
        steps.step(variant, steps.load(variant))
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak() - before


def memory(variant: str, name: str, folder: Path, device: str) -> int:
    """Return what `memory_here` returns in a separate process."""
    options = ("--memory", variant, "--cases", name, "--folder", folder, "--device", device)
    return int(in_process("benchmarks.step.optimizer_step", *options))


def measure_case(name: str, device: str, only: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """Return medians and raw repeats of one case. only: its other variants are left out"""
    case = replace(CASES[name], variants=tuple(variant for variant in CASES[name].variants if variant in only))
    with tempfile.TemporaryDirectory(prefix="emkd-step-") as scratch:
        folder = Path(scratch)
        prepare(case, folder, device)
        peaks: dict[str, list[int]] = {variant: [] for variant in case.variants}
        for _ in range(case.memory_runs):
            for variant in case.variants:
                peaks[variant].append(memory(variant, name, folder, device))
        runs = times(case, folder, device)
    middle = {variant: medians(runs[variant]) | {"peak_mib": median(peaks[variant]) / MIB} for variant in case.variants}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "memory_is": "max_memory_allocated" if device == "cuda" else "resident size",
        "median": middle,
        "runs": runs,
        "peak_bytes": peaks,
    }


def ratios(middle: dict[str, Figures]) -> Figures:
    """Return ratios of the seconds of a step and of peak memory, of variants that were measured."""
    pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= middle.keys()}
    found = {name: middle[a]["step_s"] / middle[b]["step_s"] for name, (a, b) in pairs.items()}
    return found | {f"memory {name}": middle[a]["peak_mib"] / middle[b]["peak_mib"] for name, (a, b) in pairs.items()}


def measure(names: Sequence[str] | None = None, only: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """Measure some cases; default: all but `tiny`. `gpu` is "not measured" without a GPU."""
    agreed = agreement(CASES["demo"])
    cases = measure_cases(list(names or ("demo", "cpu-larger", "cpu-real", "gpu")), partial(measure_case, only=only))
    return {
        "agreement_at_full_vocabulary": agreed,
        "cases": cases,
        "step_ratio": {name: case if case == NOT_MEASURED else ratios(case["median"]) for name, case in cases.items()},
    }


def show(result: dict[str, Any]) -> str:
    """Return two tables in Markdown."""
    lines = ["case | variant | step, s | waiting for data, s | assignment | peak, MiB", "---|---|---|---|---|---"]
    for name, case in result["cases"].items():
        if case == NOT_MEASURED:
            lines.append(f"{name} | {NOT_MEASURED} | | | |")
            continue
        for variant, one in case["median"].items():
            share = f"{one['assignment_share']:.1%}" if variant in ("cache", "codes", "live") else ""
            lines.append(
                f"{name} | {variant} | {one['step_s']:.3f} | {one['waiting_s']:.3f} | {share} | {one['peak_mib']:,.0f}"
            )
    lines += ["", "ratio | " + " | ".join(result["step_ratio"]), "---" + "|---" * len(result["step_ratio"])]
    for ratio in (*RATIOS, *(f"memory {name}" for name in RATIOS)):
        cells = [f"{one[ratio]:.2f}" if ratio in one else NOT_MEASURED for one in result["step_ratio"].values()]
        lines.append(" | ".join([ratio, *cells]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="measure only these")
    parser.add_argument("--output", type=Path, default=RESULTS / "step.json")
    parser.add_argument("--memory", choices=VARIANTS, help="measure this variant in this process and print bytes")
    parser.add_argument("--folder", type=Path, help="with --memory: the folder of the case's rows and cache")
    parser.add_argument("--device", default="cpu", help="with --memory")
    arguments = parser.parse_args()
    if arguments.memory:
        (name,) = arguments.cases
        print(json.dumps(memory_here(arguments.memory, CASES[name], arguments.folder, arguments.device)))
        return
    origin = provenance()
    result = measure(arguments.cases, arguments.variants)
    print(show(result))
    write_results(arguments.output, {**origin, **result})


if __name__ == "__main__":
    main()
