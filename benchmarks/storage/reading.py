"""Reading whole samples in training order: the cache compared with raw numbers, MDS and slices of Zarr arrays.

    python -m benchmarks.storage.reading [--work FOLDER] [--shards 8] [--per-shard 128] [--rounds 5]

The samples of common/synthetic_records.py (k = 64, affinity, tails and answers included) are written in all forms of
reading_forms.py and read by the systems of reading_systems.py in the order of a student's run: shards shuffled, samples
shuffled within windows of two shards. emkd compares every object with its hash; no other system checks anything. All
systems must return the same numbers, which is compared on some samples of each run.

Each run is a separate process that imports, opens and reads one epoch; the next epoch is timed. Systems run in turn,
round after round, with files in the page cache. On a busy machine, compare samples per second of CPU time (all threads
of the process count; a reader that waits for nothing would have the same rate on an idle machine). Two processes at
once read half of the shards each, and their rates are added. Peak memory is the largest resident size beyond the size
after opening (mapped pages of files count, which only raw-memmap has).

When a reader frees the memory of a sample, glibc's malloc may return it to the system, and the next sample then causes
page faults: hundreds of pages a sample or none, from one process to the next. That changes MDS by half and emkd with
lz4 hardly, because emkd reuses its buffers. The systems that matter therefore run a second time with a malloc that
keeps memory (+kept: MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_), which a training run has only if its user sets it.

mosaicml-streaming and zarrs have a separate environment (build/mds, made here from requirements-mds.txt), which also
sees this environment's packages, so that NumPy and numcodecs are the same for all systems.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common.provenance import BUILD, ROOT
from benchmarks.storage.reading_forms import offsets
from benchmarks.storage.reading_prepare import COMPRESSIONS, K, environment, mds_environment, prepare
from benchmarks.storage.reading_systems import FOREIGN, SYSTEMS
from emkd.storage import Cache
from emkd.trainer.data.order import epoch_order

WINDOW, SEED = 2, 0
KEPT = "+kept"
RUNS = [
    *SYSTEMS,
    *(f"{name}{KEPT}" for name in ("emkd-zstd", "emkd-lz4", "mds-same-zstd", "mds-same-lz4", "mds-zstd", "mds-lz4")),
]
# ratio -> (numerator, denominator)
RATIOS = {
    "zstd_over_mds_same_codec": ("emkd-zstd", "mds-same-zstd"),
    "lz4_over_mds_same_codec": ("emkd-lz4", "mds-same-lz4"),
    "zstd_over_mds_zstd": ("emkd-zstd", "mds-zstd"),
    "lz4_over_mds_lz4": ("emkd-lz4", "mds-lz4"),
    "zstd_over_mds_same_codec_kept": ("emkd-zstd+kept", "mds-same-zstd+kept"),
    "lz4_over_mds_same_codec_kept": ("emkd-lz4+kept", "mds-same-lz4+kept"),
    "zstd_over_mds_whole": ("emkd-zstd", "mds-whole-zstd"),
    "zstd_over_slices": ("emkd-zstd", "zarr-slices"),
    "zstd_over_slices_of_small_chunks": ("emkd-zstd", "zarr-slices-small-chunks"),
    "zstd_over_memmap": ("emkd-zstd", "raw-memmap"),
    "lz4_over_memmap": ("emkd-lz4", "raw-memmap"),
    "zarrs_over_own_zstd": ("emkd-zstd-zarrs", "emkd-zstd"),
    "zarrs_over_own_lz4": ("emkd-lz4-zarrs", "emkd-lz4"),
}


def orders(work: Path, n_shards: int, per_shard: int, n_processes: int) -> list[Path]:
    """Write the order of each process to a file: [samples, 2], the shard and the position in the shard."""
    found = []
    for process, shards in enumerate(np.array_split(np.arange(n_shards), n_processes)):
        order = epoch_order([per_shard] * len(shards), WINDOW, SEED, 0)
        pairs = np.stack([shards[order // per_shard], order % per_shard], axis=1)
        found.append(work / f"order-{n_processes}-{process}.npy")
        np.save(found[-1], pairs)
    return found


def run(work: Path, name: str, order_files: list[Path]) -> dict[str, Any]:
    """Run one of RUNS in one process for each order, all started at once."""
    system = name.removesuffix(KEPT)
    python = str(mds_environment()) if system in FOREIGN else sys.executable
    script = [python, "-m", "benchmarks.storage.reading_systems", str(work), "--system", system]
    processes = [
        subprocess.Popen(
            [*script, "--window", str(WINDOW), "--order", str(order)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(kept=name != system),
        )
        for order in order_files
    ]
    for process in processes:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} did not start; its error is above")
    for process in processes:
        if process.stdin is not None:
            process.stdin.write("go\n")
            process.stdin.flush()
    found = [json.loads(process.communicate()[0]) for process in processes]
    return {
        "samples_per_s": sum(one["samples"] / one["seconds"] for one in found),
        "samples_per_cpu_s": sum(one["samples"] / one["cpu_seconds"] for one in found),
        "peak_mib": max(one["peak_mib"] for one in found),
        "page_faults_per_sample": sum(one["page_faults"] for one in found) / sum(one["samples"] for one in found),
        "digest": [one["digest"] for one in found],
    }


def race(work: Path, n_shards: int, per_shard: int, rounds: int, systems: list[str]) -> dict[str, Any]:
    """Return raw repeats by number of processes and system. Raises RuntimeError if systems read different numbers."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for n_processes in (1, 2):
        files = orders(work, n_shards, per_shard, n_processes)
        runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
        for _ in range(rounds):
            for system in systems:
                runs[system].append(run(work, system, files))
        digests = {json.dumps(one.pop("digest")) for repeats in runs.values() for one in repeats}
        if len(digests) != 1:
            raise RuntimeError(f"the systems read different numbers from {work}; expected the same samples")
        found[f"{n_processes}"] = runs
    return found


def sizes(work: Path, n_shards: int, per_shard: int) -> dict[str, Any]:
    """Return bytes on disk by form, and by array for the caches, in total and for one vision token."""
    ends = [offsets(folder) for folder in sorted((work / "raw").iterdir())]
    tokens, pairs = (sum(int(one[axis][-1]) for one in ends) for axis in ("vision", "pairs"))
    folders = {folder for folder, _ in SYSTEMS.values()}
    total = {name: sum(f.stat().st_size for f in (work / name).rglob("*") if f.is_file()) for name in sorted(folders)}
    arrays = {name: _array_bytes(work / f"emkd-{name}") for name in COMPRESSIONS}
    return {
        "samples": n_shards * per_shard,
        "mean_vision_tokens": tokens / (n_shards * per_shard),
        "bytes": total,
        "bytes_per_vision_token": {name: size / tokens for name, size in total.items()},
        "array_bytes_per_vision_token": {name: {a: b / tokens for a, b in by.items()} for name, by in arrays.items()},
        "affinity_bytes_per_entry": {name: by["affinity"] / pairs for name, by in arrays.items()},
    }


def _array_bytes(cache: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in Cache.open(cache).manifest.shards:
        for file in (cache / "shards").glob(f"{name:06d}-*/*/c/**/*"):
            if file.is_file():
                array = file.relative_to(cache).parts[2]
                found[array] = found.get(array, 0) + file.stat().st_size
    return found


def measure(work: Path, n_shards: int = 8, per_shard: int = 128, rounds: int = 5, only: Any = None) -> dict[str, Any]:
    """Return medians by system and number of processes, their ratios, peak memory, bytes, and all repeats."""
    prepare(work, n_shards, per_shard)
    for file in work.rglob("*"):
        if file.is_file():
            file.read_bytes()  # into the page cache
    runs = race(work, n_shards, per_shard, rounds, list(only or RUNS))
    middle = {
        key: {p: {name: median(one[key] for one in r) for name, r in by.items()} for p, by in runs.items()}
        for key in ("samples_per_s", "samples_per_cpu_s", "peak_mib", "page_faults_per_sample")
    }
    rates = middle["samples_per_s"]
    return {
        **sizes(work, n_shards, per_shard),
        "window_shards": WINDOW,
        "k": K,
        "read_samples_per_s": rates,
        "read_ratios": _ratios(rates),
        "read_samples_per_cpu_s": middle["samples_per_cpu_s"],
        "read_cpu_ratios": _ratios(middle["samples_per_cpu_s"]),
        "read_peak_mib": middle["peak_mib"],
        "read_page_faults_per_sample": middle["page_faults_per_sample"],
        "read_runs": runs,
    }


def _ratios(rates: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    known = {name: pair for name, pair in RATIOS.items() if set(pair) <= set(rates["1"])}
    return {name: {p: by[a] / by[b] for p, by in rates.items()} for name, (a, b) in known.items()}


def show(found: dict[str, Any]) -> str:
    """Return tables in Markdown."""
    lines = [
        "system | samples/s | with two processes | samples per CPU second | faults a sample | peak, MiB | bytes a "
        "vision token",
        "---|---|---|---|---|---|---",
    ]
    for name, rate in found["read_samples_per_s"]["1"].items():
        two, memory = found["read_samples_per_s"]["2"][name], found["read_peak_mib"]["1"][name]
        cpu, faults = (found[f"read_{key}"]["1"][name] for key in ("samples_per_cpu_s", "page_faults_per_sample"))
        size = found["bytes_per_vision_token"][SYSTEMS[name.removesuffix(KEPT)][0]]
        lines.append(f"{name} | {rate:,.0f} | {two:,.0f} | {cpu:,.0f} | {faults:.0f} | {memory:,.0f} | {size:.1f}")
    lines += ["", "ratio | one process | two | by CPU time, one process", "---|---|---|---"]
    for name, by in found["read_ratios"].items():
        lines.append(f"{name} | {by['1']:.2f} | {by['2']:.2f} | {found['read_cpu_ratios'][name]['1']:.2f}")
    affinity = ", ".join(f"{name} {size:.3f}" for name, size in found["affinity_bytes_per_entry"].items())
    return "\n".join([*lines, "", f"bytes of an affinity entry: {affinity}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=BUILD / "reading")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--per-shard", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=RUNS, help="run only these")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    found = measure(arguments.work.resolve(), arguments.shards, arguments.per_shard, arguments.rounds, arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    print(show(found))


if __name__ == "__main__":
    main()
