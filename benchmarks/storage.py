"""The cache in figures: bytes, reading, writing, a million samples, shared images, in one file.

    python benchmarks/storage.py                     # all parts, about 40 minutes on two cores that do nothing else
    python benchmarks/storage.py --parts bytes sharing

    bytes     cache_bytes.py   bytes of a vision token by k and precision, and the KL
    reading   reading.py       samples a second in training order, beside raw numbers, MDS and slices of Zarr
    capture   capture.py       the job beside the bare teacher, and encoding
    scale     scale.py         1,000,000 samples and 100,000 shards
    sharing   sharing.py       images that several rows show

Each part runs in a process of its own and is written to benchmarks/results/storage.json when it is done, with command,
commit and machine under `parts`; the others stay as they are.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

RESULTS = Path(__file__).parent / "results" / "storage.json"
BUILD = Path(__file__).parent.parent / "build"
PARTS = {
    "bytes": "cache_bytes",
    "reading": "reading",
    "capture": "capture",
    "scale": "scale",
    "sharing": "sharing",
}


def measure_part(part: str) -> dict[str, Any]:
    """What a part's own `measure` finds, under the keys that it names."""
    module = importlib.import_module(PARTS[part])
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
    return importlib.import_module(PARTS[part]).show(result["reading"] if part == "reading" else result)


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
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if len(arguments.parts) == 1:
        torch.set_num_threads(1)
        write_part(arguments.parts[0], arguments.output)
        return
    for part in arguments.parts:
        print(f"\n## {part}\n", flush=True)
        command = [sys.executable, __file__, "--parts", part, "--output", str(arguments.output)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
