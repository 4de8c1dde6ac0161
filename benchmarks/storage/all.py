"""The cache in figures: bytes, reading, writing, a million samples, shared images, in one file.

    python -m benchmarks.storage.all                 # all parts, about 40 minutes on two idle cores
    python -m benchmarks.storage.all --parts bytes sharing

    bytes     cache_bytes.py        bytes of a vision token by k and precision, and the KL
    reading   reading.py            samples a second in training order, beside raw numbers, MDS and slices of Zarr
    capture   capture_overhead.py   the job beside the bare teacher, and encoding
    scale     million_samples.py    1,000,000 samples and 100,000 shards
    sharing   shared_images.py      images that several rows show

Each part runs in a separate process and is written to benchmarks/results/storage.json when it ends, with its command,
commit and machine under `parts`. Parts that do not run keep their figures.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.common.provenance import BUILD, RESULTS, ROOT, provenance

PARTS = {
    "bytes": "cache_bytes",
    "reading": "reading",
    "capture": "capture_overhead",
    "scale": "million_samples",
    "sharing": "shared_images",
}


def module_of(part: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.storage.{PARTS[part]}")


def measure_part(part: str) -> dict[str, Any]:
    """Return the result of a part's `measure`, under the keys of the results file."""
    module = module_of(part)
    if part == "bytes":
        return module.measure(BUILD / "pool-128.npz")
    if part == "reading":
        found = module.measure(BUILD / "reading")
        return {
            "read_samples_per_s": found["read_samples_per_s"],
            "read_ratios": found["read_ratios"],
            "reading": found,
        }
    return module.measure()


def show_part(part: str, result: dict[str, Any]) -> str:
    return module_of(part).show(result["reading"] if part == "reading" else result)


def write_part(part: str, output: Path) -> None:
    origin = provenance()
    result = measure_part(part)
    print(show_part(part, result), flush=True)
    found = json.loads(output.read_text()) if output.exists() else {"parts": {}}
    found["parts"][part] = {**origin, "keys": sorted(result)}
    found.update(result)
    output.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS / "storage.json")
    arguments = parser.parse_args()
    if len(arguments.parts) == 1:
        torch.set_num_threads(1)
        write_part(arguments.parts[0], arguments.output)
        return
    for part in arguments.parts:
        print(f"\n## {part}\n", flush=True)
        module = ["-m", "benchmarks.storage.all"]
        command = [sys.executable, *module, "--parts", part, "--output", str(arguments.output.resolve())]
        subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
