"""Environments beside the one that runs a benchmark."""

import subprocess
import sys
import sysconfig
from pathlib import Path


def environment_with(requirements: Path, folder: Path) -> Path:
    """Return the Python of an environment with the packages of a requirements file; make it if it does not exist.

    Only these packages are installed there, without what they ask for: all others come from the environment that runs
    this.
    """
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ours = folder / "lib" / version / "site-packages" / "ours.pth"
        ours.write_text(sysconfig.get_path("purelib") + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "-r", str(requirements)], check=True)
        (folder / ".ready").touch()
    return python
