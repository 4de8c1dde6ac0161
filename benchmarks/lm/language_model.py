"""SmolLM2-135M-Instruct as float32 weights, with a configuration that can be saved anywhere."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.lm.environment import MODEL, model_folder


def load_language_model() -> Any:
    """Return the language model. Raises ModuleNotFoundError outside of `lm_environment`."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), gguf_file=MODEL, dtype=torch.float32)
    clean(model.config)
    return model


def clean(config: Any) -> None:
    """Remove from a configuration what holds for this machine's file alone: its path, and that it is quantised.

    The weights are float32 now; transformers does not train a model whose configuration says otherwise.
    """
    config._name_or_path = MODEL
    if hasattr(config, "quantization_config"):
        del config.quantization_config
