"""What a million samples and 100,000 shards cost: opening, finding, inspecting, ordering, and the job's driver.

    python -m benchmarks.storage.million_samples
    python -m benchmarks.storage.million_samples --samples 1000 10000 --shards 1000

Index: sealed caches without arrays (index_only_cache.py), 250 samples a shard. Each run of each part is a separate
process with a warm page cache: `Cache.open` and its peak memory, then the first search and further searches; everything
that training reads from the index, in training order; the order itself; `emkd inspect` from start to end; sealing.

Driver: `emkd.pipeline.shard_pool.run_shards` and the progress of a real job with one real Ray actor whose
capture_shard returns immediately (one run for the largest number of shards). Reports the time for a shard, and how
much the driver's resident memory grows after its first 500 shards.

storage/all.py writes what `measure` returns to results/storage.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.measuring import MIB, Figures, in_process, peak, resident, seconds, timed
from benchmarks.storage.index_only_cache import ROWS_PER_SHARD, make_unsealed

SAMPLES = (1_000, 10_000, 100_000, 1_000_000)
SHARDS = (1_000, 10_000, 100_000)
WALKED = 20_000  # samples, in training order
WINDOW, BATCH_SIZE = 8, 8
WARM_SHARDS = 500
MODULE = "benchmarks.storage.million_samples"


def cost(name: str, part: Callable[[], Any], factor: float = 1.0) -> Figures:
    """Return wall-clock and CPU time of a part, times `factor`; they are equal on an idle machine."""
    found = timed(part)
    return {name: factor * found["seconds"], f"{name}_cpu": factor * found["cpu_seconds"]}


def open_and_find(folder: Path) -> Figures:
    """Measure opening and searching. The first search is for the last key, immediately after opening."""
    from emkd.storage.cache import Cache

    opened: list[Cache] = []
    found = {"before_open_mib": peak() / MIB}
    found |= cost("open_s", lambda: opened.append(Cache.open(folder)))
    found["open_peak_mib"] = peak() / MIB
    (cache,) = opened
    n = cache.n_samples
    keys = [str(cache.rows["key"][int(cache.rows.samples[i])].as_py()) for i in (0, n // 2, n - 1)]
    ids = [str(cache.rows["id"][int(cache.rows.samples[i])].as_py()) for i in (0, n // 2, n - 1)]
    wanted = {"first_key": keys[-1:], "key": keys, "id": ids, "prefix": [key[:12] for key in keys]}
    for name, texts in wanted.items():
        found[f"find_{name}_ms"] = max(1000 * seconds(lambda text=text: cache.find(text)) for text in texts)
    if cache.find(keys[-1]) != n - 1 or cache.find(ids[0]) != 0:
        raise RuntimeError(f"{folder}: a search returned a different sample than the one with that key or id")
    return found


def order_and_walk(folder: Path) -> Figures:
    """Measure what training reads from the index: each sample in training order, each shard once in each window."""
    from emkd.storage.cache import Cache
    from emkd.trainer.data.order import ShardBatchSampler, epoch_order

    cache = Cache.open(folder)
    sizes = cache.shard_sizes
    found = cost("order_s", lambda: epoch_order(sizes, WINDOW, 0, 0))
    sampler = ShardBatchSampler(sizes, window=WINDOW, seed=0, batch_size=BATCH_SIZE)
    found |= cost("sampler_s", lambda: sum(map(len, sampler)))
    order = epoch_order(sizes, WINDOW, 0, 0)[:WALKED].tolist()
    shards = list(dict.fromkeys(cache.sample_info(i).shard for i in order))  # decodes once what later reads reuse
    cache.shard_index(shards[0])
    found |= cost("sample_info_us", lambda: [cache.sample_info(i) for i in order], 1e6 / len(order))
    found |= cost("shard_index_ms", lambda: [cache.shard_index(shard) for shard in shards], 1e3 / len(shards))
    for kind in ("", "_cpu"):
        a_sample = found[f"shard_index_ms{kind}"] * 1000 / ROWS_PER_SHARD
        found[f"walk_us_per_sample{kind}"] = found[f"sample_info_us{kind}"] + a_sample
    found["walk_peak_mib"] = peak() / MIB
    return found


def seal_again(folder: Path) -> Figures:
    """Measure sealing."""
    from emkd.storage.lifecycle.seal import seal
    from emkd.storage.objects.open import open_files

    for name in ("seal.json", "index.parquet"):
        (folder / name).unlink(missing_ok=True)
    return {**cost("seal_s", lambda: seal(open_files(folder))), "seal_peak_mib": peak() / MIB}


class Instant:
    """A worker whose teacher takes no time."""

    def capture_shard(self, number: int, following: int | None = None) -> Any:
        from emkd.pipeline.worker import ShardReport

        counts = dict.fromkeys(("n_skipped", "n_halved", "n_shared", "n_different"), 0)
        return ShardReport(number=number, committed=True, n_samples=250, n_bytes=10**8, seconds=0.0, **counts)


def drive(n_shards: int) -> Figures:
    """Measure the driver: the time for a shard overall and in the first and last tenth, which should be equal."""
    import ray

    from emkd.interrupt import finish_on_interrupt
    from emkd.pipeline.actors import RETRIES
    from emkd.pipeline.progress import progress
    from emkd.pipeline.shard_pool import run_shards
    from emkd.pipeline.worker import ShardReport
    from emkd.ray_session import session

    tenth = n_shards // 10
    at: dict[int, float] = {}
    with session(None, workers=1, gpus_per_worker=0):
        worker = ray.remote(max_restarts=-1, max_task_retries=RETRIES, num_cpus=1)(Instant).remote()
        with (
            progress(WARM_SHARDS, 250 * WARM_SHARDS) as show,
            finish_on_interrupt("finishing the current shards") as interrupt,
        ):
            run_shards([worker], range(WARM_SHARDS), interrupt, show)
        before, done, started, used = resident() / MIB, 0, time.perf_counter(), time.process_time()
        with (
            progress(n_shards, 250 * n_shards) as show,
            finish_on_interrupt("finishing the current shards") as interrupt,
        ):

            def counted(report: ShardReport) -> None:
                nonlocal done
                done += 1
                if done in (tenth, n_shards - tenth, n_shards):
                    at[done] = time.perf_counter() - started
                show(report)

            outcome = run_shards([worker], range(n_shards), interrupt, counted)
        grown, used = resident() / MIB - before, time.process_time() - used
    if outcome.n_done != n_shards:
        raise RuntimeError(f"the driver finished {outcome.n_done} of {n_shards} shards: {outcome.first_failure}")
    return {
        "load": os.getloadavg()[0],
        "ms_per_shard": 1000 * at[n_shards] / n_shards,
        "ms_per_shard_cpu": 1000 * used / n_shards,
        "first_tenth_ms_per_shard": 1000 * at[tenth] / tenth,
        "last_tenth_ms_per_shard": 1000 * (at[n_shards] - at[n_shards - tenth]) / tenth,
        "rss_growth_mib": grown,
        "rss_mib": before + grown,
    }


PARTS: dict[str, Callable[[Path], Figures]] = {"open": open_and_find, "walk": order_and_walk, "seal": seal_again}


def inspect(folder: Path) -> Figures:
    """Measure `emkd inspect` as a whole process, with and without --json."""
    command = [sys.executable, "-m", "emkd.cli", "inspect", str(folder)]

    def run(*more: str) -> float:
        return seconds(lambda: subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL))

    return {"inspect_s": run(), "inspect_json_s": run("--json")}


def middle(runs: list[Figures]) -> Figures:
    """Return the median of each figure, to four digits."""
    return {name: float(f"{median(run[name] for run in runs):.4g}") for name in runs[0]}


def measure_index(n_samples: int, runs: int) -> dict[str, Any]:
    """Return medians and raw repeats of all parts but the driver, for one number of samples."""
    with tempfile.TemporaryDirectory(prefix="emkd-scale-") as scratch:
        folder = Path(scratch) / "cache"
        make_unsealed(folder, n_samples)
        found = [in_process(MODULE, "--part", "seal", folder) for _ in range(runs)]
        for run in found:
            run["load"] = os.getloadavg()[0]  # of the whole machine, other programs included
            run |= in_process(MODULE, "--part", "open", folder) | in_process(MODULE, "--part", "walk", folder)
            run |= inspect(folder)
    return {"n_shards": -(-n_samples // ROWS_PER_SHARD), "median": middle(found), "runs": found}


def measure_driver(n_shards: int, runs: int) -> dict[str, Any]:
    """Return medians and raw repeats of the driver, for one number of shards."""
    found = [in_process(MODULE, "--part", "driver", n_shards) for _ in range(runs)]
    return {"median": middle(found), "runs": found}


def measure(
    samples: tuple[int, ...] = SAMPLES,
    shards: tuple[int, ...] = SHARDS,
    runs: int = 3,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return `index` by number of samples and `driver` by number of shards, and `index_open_s`."""
    result: dict[str, Any] = {"index_open_s": {}, "index": {}, "driver": {}}
    for n in samples:
        result["index"][str(n)] = one = measure_index(n, runs)
        result["index_open_s"][str(n)] = one["median"]["open_s"]
        log(f"{n:,} samples: {one['median']}")
    for n in shards:
        result["driver"][str(n)] = one = measure_driver(n, runs if n < SHARDS[-1] else 1)
        log(f"{n:,} shards: {one['median']}")
    return result


def show(result: dict[str, Any]) -> str:
    """Return two tables in Markdown: a figure a row, a size a column."""
    tables = []
    for part, unit in (("index", "samples"), ("driver", "shards")):
        columns = result[part]
        if columns:
            tables.append(" | ".join([unit, *(f"{int(n):,}" for n in columns)]))
            tables.append("|".join(["---", *("---:" for _ in columns)]))
            names = next(iter(columns.values()))["median"]
            tables += [" | ".join([n, *(f"{c['median'][n]:,.4g}" for c in columns.values())]) for n in names]
            tables.append("")
    return "\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs=2, metavar=("NAME", "OF"), help="run one part in this process and print JSON")
    parser.add_argument("--samples", type=int, nargs="*", default=SAMPLES)
    parser.add_argument("--shards", type=int, nargs="*", default=SHARDS)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.part:
        name, of = arguments.part
        print(json.dumps(drive(int(of)) if name == "driver" else PARTS[name](Path(of))))
    else:
        print(show(measure(tuple(arguments.samples), tuple(arguments.shards), arguments.runs)))


if __name__ == "__main__":
    main()
