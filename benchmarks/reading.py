"""Reading whole samples in training order: our cache beside raw numbers, MDS and slices of Zarr arrays.

    python benchmarks/reading.py [--work FOLDER] [--shards 8] [--per-shard 128] [--rounds 5]

The samples of synthetic_records.py (k = 64, affinity, tails and answers included), written in all forms of
reading_data.py, and read by the systems of reading_systems.py in the order that a student's run has: shards shuffled,
samples shuffled within windows of two. Ours compares every object with its hash; no other one checks anything. All
end with the same numbers in memory, which is compared on some samples of each run.

Each run is a process of its own: it imports, opens and reads one epoch, and then the clock runs for another one.
Systems take turns, round after round, files in the page cache. On a machine that does other things as well, samples
per second of CPU time say more (all threads of the process count; a reader that waits for nothing has the same rate
when alone). With two processes at once each one has its own half of the shards and their rates are added. Peak memory
is the largest resident size beyond that after opening (mapped pages of files count, which only raw-memmap has).

A reader that frees what a sample took gives it back to the system or not, as glibc's malloc happens to see it, and then
has to fault it in again: hundreds of pages a sample or none, from one process to the next. That moves MDS by half, and
ours hardly with lz4, which uses its memory again itself. So those that matter run a second time with a malloc that
keeps what it has (+kept: MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_), which nobody's training has unless somebody
thought of it.

mosaicml-streaming and zarrs are in an environment of their own (build/mds, made here with requirements-mds.txt),
which sees our packages too, so that NumPy and numcodecs are the same for all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from reading_data import offsets
from reading_prepare import BUILD, COMPRESSIONS, HERE, K, environment, mds_environment, prepare
from reading_systems import FOREIGN, SYSTEMS

from emkd.storage import Cache
from emkd.trainer.data.order import epoch_order

WINDOW, SEED = 2, 0
KEPT = "+kept"
RUNS = [
    *SYSTEMS,
    *(f"{name}{KEPT}" for name in ("emkd-zstd", "emkd-lz4", "mds-same-zstd", "mds-same-lz4", "mds-zstd", "mds-lz4")),
]
# ratio -> (ours, the other)
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
    """For each process the file of its order: [samples, 2] shard and place in it."""
    found = []
    for process, shards in enumerate(np.array_split(np.arange(n_shards), n_processes)):
        order = epoch_order([per_shard] * len(shards), WINDOW, SEED, 0)
        pairs = np.stack([shards[order // per_shard], order % per_shard], axis=1)
        found.append(work / f"order-{n_processes}-{process}.npy")
        np.save(found[-1], pairs)
    return found


def run(work: Path, name: str, order_files: list[Path]) -> dict[str, Any]:
    """One of RUNS in as many processes as there are orders, begun at once."""
    system = name.removesuffix(KEPT)
    python = str(mds_environment()) if system in FOREIGN else sys.executable
    script = [python, str(HERE / "reading_systems.py"), str(work), "--system", system, "--window", str(WINDOW)]
    processes = [
        subprocess.Popen(
            [*script, "--order", str(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(kept=name != system),
        )
        for order in order_files
    ]
    for process in processes:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} did not start")
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
    """Raw repeats by processes and system. RuntimeError where two systems end with other numbers."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for n_processes in (1, 2):
        files = orders(work, n_shards, per_shard, n_processes)
        runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
        for _ in range(rounds):
            for system in systems:
                runs[system].append(run(work, system, files))
        digests = {json.dumps(one.pop("digest")) for repeats in runs.values() for one in repeats}
        if len(digests) != 1:
            raise RuntimeError("systems read different numbers: this compares different things")
        found[f"{n_processes}"] = runs
    return found


def sizes(work: Path, n_shards: int, per_shard: int) -> dict[str, Any]:
    """Bytes on disk, of our caches by array too, and what makes them comparable."""
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
    """Medians by system and processes, ratios of them, peak memory, bytes, and all repeats."""
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
    """Tables in Markdown."""
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
    parser.add_argument("--only", nargs="+", choices=RUNS, help="these alone")
    parser.add_argument("--json", type=Path, help="write all figures there too")
    arguments = parser.parse_args()
    found = measure(arguments.work, arguments.shards, arguments.per_shard, arguments.rounds, arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    print(show(found))


if __name__ == "__main__":
    main()
