"""How long `emkd inspect` takes as a whole process, start of Python included.

    python -m benchmarks.storage.inspect_time CACHE --runs 7

CACHE is the cache of a folder that `emkd demo` made. `python -c pass` and `import torch` run in turn with
`emkd inspect`, so that you can compare the figure between machines. Writes benchmarks/results/inspect_time.json.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.common.measuring import seconds
from benchmarks.common.provenance import RESULTS, provenance, write_results


def process_seconds(command: list[str]) -> float:
    """Return the seconds of a whole process."""
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    origin = provenance()
    python = sys.executable
    inspect = [python, "-m", "emkd.cli", "inspect", str(arguments.cache)]
    commands = {
        "python": [python, "-c", "pass"],
        "import torch": [python, "-c", "import torch"],
        "inspect": inspect,
        "inspect --sample": [*inspect, "--sample", "train-00003"],
    }
    for command in commands.values():
        process_seconds(command)  # warms the page cache
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            found[name].append(round(process_seconds(command), 4))
    medians = {name: median(values) for name, values in found.items()}
    write_results(RESULTS / "inspect_time.json", {**origin, "median_s": medians, "seconds": found})
    print(medians)


if __name__ == "__main__":
    main()
