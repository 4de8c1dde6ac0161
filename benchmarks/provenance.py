"""What every results file says of its origin: command, commit, machine, versions, time."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("emkd", "torch", "transformers", "ray", "zarr", "numcodecs", "scipy")


def provenance() -> dict[str, Any]:
    """Where figures come from; to be called first, so that the commit is the one that runs.

    `dirty` is True where the working tree had changes. Folders are named without what is above them.
    """
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return {
        "command": " ".join(["python", *words]),
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


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
