"""The parts of a student: vision tower, language model, processor; each is checked before its weights are loaded."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
)
from transformers.utils import logging

from emkd.agreement.tokenizer import check_shared_tokenizer, lacking_ids
from emkd.errors import InputNotFoundError, ModelError, TokenizerMismatchError, UsageError
from emkd.vlm.identity import tokenizer_json


@contextmanager
def named(option: str, value: str) -> Iterator[None]:
    """While open, an error about a model names the option that the model came from."""
    try:
        yield
    except (InputNotFoundError, ModelError, TokenizerMismatchError) as error:
        raise type(error)(f"{option} {value}: {error}") from error


def image_token(path: Path) -> int:
    """Return the id of a checkpoint's image placeholders. Raises ModelError if it has none."""
    token = getattr(config_of(path), "image_token_id", None)
    if token is None:
        raise ModelError("its config names no image_token_id: not a vision-language model")
    return int(token)


def check_ids(language: Path, teacher: Path) -> tuple[str, ...]:
    """Compare the ids of the language model and the teacher, and return notes on what could not be compared.

    Raises TokenizerMismatchError if an id means different tokens to them.
    """
    if not (language / "tokenizer.json").is_file():
        return (f"{language} has no tokenizer.json: emkd cannot check that its ids mean the same as the teacher's",)
    theirs, own = tokenizer_json(teacher), tokenizer_json(language)
    try:
        check_shared_tokenizer(theirs, own)
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(
            f"its embeddings do not belong to the ids of --like ({error}); use a language model with the same tokenizer"
        ) from error
    lacking = lacking_ids(theirs, own)
    some = ", ".join(list(lacking.values())[:4])
    return (
        (f"{language} lacks {len(lacking)} of the teacher's tokens ({some}), so their rows are untrained",)
        if lacking
        else ()
    )


def config_of(path: Path) -> Any:
    """Return a checkpoint's config. Raises ModelError if transformers does not know it."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"its config cannot be read: {str(error).splitlines()[0]}") from error


def vision_config(path: Path) -> Any:
    """Return the config of a vision tower, or of the vision part of a checkpoint with a text part (CLIP, SigLIP).

    Raises ModelError for a whole vision-language model.
    """
    config = config_of(path)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(f"it is a whole vision-language model ({config.model_type}); pass only its vision tower")
    return config.vision_config if "vision_config" in config.sub_configs else config


def check_vision(config: Any, layer: int, window: int) -> None:
    """Check the vision tower's config before any weights are loaded.

    Raises ModelError if it is no vision transformer, UsageError if it does not have this layer or window.
    """
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ModelError(f"a {config.model_type} has no image_size and patch_size, so it is not a vision transformer")
    if not isinstance(config.image_size, int):
        raise ModelError(
            f"its image_size is {config.image_size}; expected one number, the side of a square tile in pixels"
        )
    n_layers = config.num_hidden_layers
    if not -n_layers <= layer <= -1:
        raise UsageError(f"--vision-layer {layer}: this vision tower has {n_layers} layers; expected -{n_layers} to -1")
    side = config.image_size // config.patch_size
    if window < 1 or side % window:
        divisors = [n for n in range(1, side + 1) if side % n == 0]
        raise UsageError(
            f"--vision-pool {window}: a tile of this vision tower is {side} x {side} tokens; expected one of {divisors}"
        )


def language_model(path: Path) -> Any:
    """Load a language model. Raises ModelError if it is not a language model, or has parts that a LLaVA-NeXT lacks."""
    config = config_of(path)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"it is a {config.model_type}, not a language model")
    text, unused = loaded(AutoModelForCausalLM, path)
    if unused:
        raise ModelError(
            f"it has weights that a {type(text).__name__} lacks ({unused}), so it is more than a language model"
        )
    head = text.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or not hasattr(text, "lm_head") or head.bias is not None:
        raise ModelError(f"a {type(text).__name__} has no linear lm_head without a bias, which LLaVA-NeXT needs")
    return text


def loaded(kind: Any, path: Path, **options: Any) -> tuple[Any, dict[str, int]]:
    """Load a model with all of its weights.

    Returns the model and the number of further weights in the checkpoint, by the first part of their names. Raises
    ModelError if a weight is missing or cannot be read.
    """
    try:
        with _quiet():
            model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"it cannot be loaded: {str(error).splitlines()[0]}") from error
    lacking = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if lacking:
        raise ModelError(f"{len(lacking)} weights of a {type(model).__name__} are missing, for instance {lacking[:3]}")
    return model, dict(Counter(str(name).partition(".")[0] for name in report["unexpected_keys"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report: `loaded` raises an error for missing weights and returns the unused ones."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def image_processor(path: Path) -> Any:
    """Load a vision tower's image processor. Raises ModelError if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            "it has no image processor (preprocessor_config.json), which defines how pixels are normalized; put the "
            "file next to the weights"
        ) from error


@torch.no_grad()
def feature_strategy(tower: Any) -> Literal["default", "full"]:
    """Return LLaVA's feature strategy: "full" takes all tokens of the tower, "default" drops a first one (no patch).

    Raises ModelError for a tower with more tokens that are no patches.
    """
    size, patch = tower.config.image_size, tower.config.patch_size
    given = torch.zeros(1, 3, size, size, dtype=tower.dtype)
    extra = int(tower(pixel_values=given).last_hidden_state.shape[1]) - (size // patch) ** 2
    if extra not in (0, 1):
        raise ModelError(f"a {type(tower).__name__} has {extra} tokens besides its patches; at most 1 is supported")
    return "default" if extra else "full"
