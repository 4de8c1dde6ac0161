"""Where figures come from: command, commit, machine, versions and time, written to every results file."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build"  # large inputs, kept from run to run; git ignores it
PACKAGES = ("emkd", "torch", "transformers", "ray", "zarr", "numcodecs", "scipy")


def provenance() -> dict[str, Any]:
    """Return the origin of figures. Call it first, so that the commit is the one that runs.

    `dirty` is True if the working tree had changes. Absolute paths are cut to their last part.
    """
    return {
        "command": _command(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(terse=True),
            "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write one results file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _command() -> str:
    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = [sys.argv[0]] if main is None else ["-m", main.name]
    words = [Path(word).name if Path(word).is_absolute() else word for word in (*program, *sys.argv[1:])]
    return " ".join(["python", *words])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
