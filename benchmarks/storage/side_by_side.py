"""Reading a cache with two checkouts of emkd, alternately on the same files: is the new one as fast as the old one?

    python -m benchmarks.storage.side_by_side OLD_CHECKOUT NEW_CHECKOUT [--rounds 5] [--epochs 3]

Each round starts one process of read_cache.py for each checkout and compression, with PYTHONPATH set to the checkout.
A process opens the cache, reads one epoch untimed and then `--epochs` timed ones, in training order. The order of the
checkouts alternates from round to round, and files are in the page cache.

The checkout that runs this script writes the caches (records of reading.py, k = 64, zstd and lz4), unless the folder
`--work` exists: it may hold caches `emkd-zstd` and `emkd-lz4` that an older checkout wrote. Prints medians, their ratio
new / old, and the raw repeats; `--json` writes all of them to a file.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.provenance import BUILD, provenance, write_results
from benchmarks.storage.reading_prepare import COMPRESSIONS, write_caches

Rates = dict[str, list[dict[str, float]]]  # by checkout: "old", "new"


def read(root: Path, cache: Path, epochs: int) -> list[dict[str, float]]:
    """Return the rates of one process. Raises RuntimeError if it imported another emkd than the checkout's."""
    script = str(Path(__file__).with_name("read_cache.py"))
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", script, str(cache), str(epochs)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout)
    if Path(found["emkd"]).resolve() != (root / "emkd").resolve():
        raise RuntimeError(f"imported emkd from {found['emkd']}, expected {root / 'emkd'}")
    rates: list[dict[str, float]] = found["epochs"]
    return rates


def race(roots: dict[str, Path], cache: Path, rounds: int, epochs: int) -> Rates:
    """Return raw repeats by checkout; the first round starts with the old one, the second with the new one."""
    found: Rates = {name: [] for name in roots}
    for number in range(rounds):
        for name in sorted(roots, reverse=number % 2 == 0):
            found[name] += read(roots[name], cache, epochs)
    return found


def summary(runs: Rates) -> dict[str, Any]:
    """Return medians by checkout, and the ratio new / old of each rate."""
    middle = {
        name: {rate: median(one[rate] for one in repeats) for rate in repeats[0]} for name, repeats in runs.items()
    }
    return {"median": middle, "ratio": {rate: middle["new"][rate] / old for rate, old in middle["old"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, default=BUILD / "side-by-side")
    parser.add_argument("--shards", type=int, default=4, help="of the caches, if they are not in --work yet")
    parser.add_argument("--per-shard", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    origin = provenance()
    if not arguments.work.exists():
        for _ in write_caches(arguments.work, arguments.shards, arguments.per_shard):
            pass
    roots = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    found = {}
    print("cache | old, samples/s | new | new / old | by CPU time\n---|---|---|---|---")
    for name in COMPRESSIONS:
        runs = race(roots, (arguments.work / f"emkd-{name}").resolve(), arguments.rounds, arguments.epochs)
        found[name] = {**summary(runs), "runs": runs}
        old, new = (found[name]["median"][root]["samples_per_s"] for root in roots)
        ratio = found[name]["ratio"]
        rates = f"{ratio['samples_per_s']:.3f} | {ratio['samples_per_cpu_s']:.3f}"
        print(f"{name} | {old:,.0f} | {new:,.0f} | {rates}", flush=True)
        for root in roots:
            repeats = " ".join(f"{one['samples_per_s']:,.0f}" for one in runs[root])
            print(f"  {root}: {repeats}", flush=True)
    if arguments.json:
        write_results(arguments.json, {**origin, **found})


if __name__ == "__main__":
    main()
