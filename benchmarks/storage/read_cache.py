"""Read a cache in training order and print the rates as JSON: the process that side_by_side.py starts.

It runs with PYTHONPATH set to any checkout, so it imports only emkd.storage.Cache and uses only `Cache.open`, `shards`,
`samples_of_shard` and `record`.
"""

import json
import random
import sys
import time
from pathlib import Path

from emkd.storage import Cache

WINDOW = 2


def training_order(cache: Cache) -> list[int]:
    """Return every sample once: shards shuffled, samples shuffled within windows of WINDOW shards."""
    rng = random.Random(0)
    shards = rng.sample(cache.shards, len(cache.shards))
    order = []
    for first in range(0, len(shards), WINDOW):
        window = [i for shard in shards[first : first + WINDOW] for i in cache.samples_of_shard(shard)]
        order += rng.sample(window, len(window))
    return order


def epoch(cache: Cache, order: list[int]) -> dict[str, float]:
    """Read every sample once and return samples per second and per second of CPU time."""
    started, cpu = time.perf_counter(), time.process_time()
    for i in order:
        cache.record(i)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"samples_per_s": len(order) / seconds, "samples_per_cpu_s": len(order) / cpu_seconds}


def main() -> None:
    """Print the rates of all epochs but the first, in which the process gets fresh memory from the system."""
    folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
    cache = Cache.open(folder, window=WINDOW)
    order = training_order(cache)
    rates = [epoch(cache, order) for _ in range(epochs + 1)][1:]
    print(json.dumps({"emkd": str(Path(sys.modules["emkd"].__file__ or "").parent), "epochs": rates}))


if __name__ == "__main__":
    main()
