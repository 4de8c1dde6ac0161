"""Time and memory of an optimizer step: fine-tuning, EM-KD from a cache, EM-KD with the teacher in memory.

    python benchmarks/step.py                      # demo, cpu-larger, cpu-real, and gpu where there is one
    python benchmarks/step.py --cases tiny --output step.json

Four variants take steps in turn, on the same student and the same batch (cases.py):

    sft     Sup alone, the LM head on answer tokens alone
    cache   EM-KD, the teacher's records read from a cache
    dense   EM-KD with the teacher in memory, as one writes it down from the paper (dense.py)
    live    EM-KD with the teacher in memory and our losses: its top-k is taken in the step

A step is forward, teacher where there is one, losses, backward, clipping, AdamW. Its learning rate is 0, so that all
steps are the same one. What happens before is "waiting for data" and timed apart: pictures, tokens, and in `cache` a
shard of the batch's size, read, checked and decoded; no worker fetches anything ahead, files are in the page cache.

Memory is that of two steps in a process of its own, weights and optimizer state included: on a CPU the largest
resident size since the models were there, minus that before they were made; on a GPU torch's max_memory_allocated.

Before anything is timed, the losses of `cache`, `dense` and `live` are compared on the demonstration's pair at k = V.
Writes benchmarks/results/step.json; `step_ratio` has ratios of medians.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import CASES, ROWS_NAME, Case, write_cache
from memory import MIB, peak, reset_peak
from provenance import provenance
from variants import VARIANTS, Steps

NOT_MEASURED = "not measured"
LOSSES = ("sup", "rld", "vsd", "vlad")
RATIOS = {
    "cache/sft": ("cache", "sft"),
    "dense teacher/cache": ("dense", "cache"),
    "teacher with our losses/cache": ("live", "cache"),
}

Run = dict[str, float]


def prepare(case: Case, folder: Path, device: str) -> None:
    """Writes the case's rows and their cache into an empty folder."""
    case.write_rows(folder / ROWS_NAME)
    write_cache(case, folder, case.teacher(device))


def agreement(case: Case, device: str = "cpu") -> dict[str, float]:
    """Largest relative difference of each loss between `dense` and, at k = V, `cache` and `live`.

    Raises RuntimeError above 1e-4: figures of different things are not to be compared.
    """
    with tempfile.TemporaryDirectory(prefix="emkd-step-") as scratch:
        prepare(case.uncut(), Path(scratch), device)
        steps = Steps(case.uncut(), Path(scratch), device, VARIANTS)
        found = {variant: steps.step(variant, steps.load(variant)) for variant in ("cache", "dense", "live")}
    differences = {
        name: max(abs(found[variant][name] / found["dense"][name] - 1) for variant in ("cache", "live"))
        for name in LOSSES
    }
    if max(differences.values()) > 1e-4:
        raise RuntimeError(f"the losses of one step differ: {found}")
    return differences


def times(case: Case, folder: Path, device: str) -> dict[str, list[Run]]:
    """Raw repeats of all variants, in turn; the first round of each is dropped."""
    steps = Steps(case, folder, device, case.variants)
    found: dict[str, list[Run]] = {variant: [] for variant in case.variants}
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
                raise RuntimeError(f"{variant}: {name} went from {first} to {last}: the steps were not the same one")
    return found


def memory_here(variant: str, case: Case, folder: Path, device: str) -> int:
    """Bytes that two steps of a variant take, in this process, which should not have done anything else.

    What libraries allocate once is not counted: steps of a small pair come first.
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
    for _ in range(2):  # the second one has the optimizer's state from its beginning
        steps.step(variant, steps.load(variant))
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak() - before


def memory(variant: str, name: str, folder: Path, device: str) -> int:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--memory", variant, "--cases", name]
    result = subprocess.run(
        [*command, "--folder", str(folder), "--device", device], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(json.loads(result.stdout))


def measure_case(name: str, device: str) -> dict[str, Any]:
    """Medians and raw repeats of one case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="emkd-step-") as scratch:
        folder = Path(scratch)
        prepare(case, folder, device)
        peaks: dict[str, list[int]] = {variant: [] for variant in case.variants}
        for _ in range(case.memory_runs):
            for variant in case.variants:
                peaks[variant].append(memory(variant, name, folder, device))
        runs = times(case, folder, device)
    middle = {
        variant: {key: median(run[key] for run in runs[variant]) for key in runs[variant][0]}
        | {"peak_mib": median(peaks[variant]) / MIB}
        for variant in case.variants
    }
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "memory_is": "max_memory_allocated" if device == "cuda" else "resident size",
        "median": middle,
        "runs": runs,
        "peak_bytes": peaks,
    }


def ratios(middle: dict[str, Run]) -> Run:
    """Of the seconds of a step, and of peak memory, where both variants were measured."""
    pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= middle.keys()}
    found = {name: middle[a]["step_s"] / middle[b]["step_s"] for name, (a, b) in pairs.items()}
    return found | {f"memory {name}": middle[a]["peak_mib"] / middle[b]["peak_mib"] for name, (a, b) in pairs.items()}


def measure(names: list[str] | None = None) -> dict[str, Any]:
    """All cases, or some. `gpu` is "not measured" where there is none."""
    found: dict[str, Any] = {"agreement_at_full_vocabulary": agreement(CASES["demo"]), "cases": {}, "step_ratio": {}}
    for name in names or ["demo", "cpu-larger", "cpu-real", "gpu"]:
        if name == "gpu" and not torch.cuda.is_available():
            found["cases"][name] = found["step_ratio"][name] = NOT_MEASURED
            continue
        found["cases"][name] = measure_case(name, "cuda" if name == "gpu" else "cpu")
        found["step_ratio"][name] = ratios(found["cases"][name]["median"])
    return found


def show(result: dict[str, Any]) -> str:
    """Two tables in Markdown."""
    lines = ["case | variant | step, s | waiting for data, s | assignment | peak, MiB", "---|---|---|---|---|---"]
    for name, case in result["cases"].items():
        if case == NOT_MEASURED:
            lines.append(f"{name} | {NOT_MEASURED} | | | |")
            continue
        for variant, one in case["median"].items():
            share = f"{one['assignment_share']:.1%}" if variant in ("cache", "live") else ""
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
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step.json")
    parser.add_argument("--memory", choices=VARIANTS, help="of this variant alone, here, printed as bytes")
    parser.add_argument("--folder", type=Path, help="with --memory: where the case's rows and cache are")
    parser.add_argument("--device", default="cpu", help="with --memory")
    arguments = parser.parse_args()
    if arguments.memory:
        (name,) = arguments.cases
        print(memory_here(arguments.memory, CASES[name], arguments.folder, arguments.device))
        return
    origin = provenance()
    result = measure(arguments.cases)
    print(show(result))
    arguments.output.write_text(json.dumps({**origin, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
