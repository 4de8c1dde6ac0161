"""How long `emkd inspect` takes as a whole process, start of Python included.

    python benchmarks/inspect_time.py CACHE --runs 7

Beside it a bare `python -c pass` and an `import torch` on the same machine, in turn, so that the figure can be
read on another one. Writes benchmarks/results/inspect_time.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from provenance import provenance


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


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
        seconds(command)  # warm
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            found[name].append(round(seconds(command), 4))
    medians = {name: median(values) for name, values in found.items()}
    path = Path(__file__).parent / "results" / "inspect_time.json"
    path.write_text(json.dumps({**origin, "median_s": medians, "seconds": found}, indent=2) + "\n")
    print(medians)


if __name__ == "__main__":
    main()
