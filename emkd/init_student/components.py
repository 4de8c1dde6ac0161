"""The parts that a student is put together from: read, and checked before their weights are."""

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
    """Errors of one of three models say which one it is."""
    try:
        yield
    except (InputNotFoundError, ModelError, TokenizerMismatchError) as error:
        raise type(error)(f"{option} {value}: {error}") from error


def image_token(path: Path) -> int:
    token = getattr(config_of(path), "image_token_id", None)
    if token is None:
        raise ModelError("its config names no image_token_id: not a vision-language model")
    return int(token)


def check_ids(language: Path, teacher: Path) -> tuple[str, ...]:
    """What could not be compared. Raises TokenizerMismatchError where an id means another token to the language model
    than to the teacher."""
    if not (language / "tokenizer.json").is_file():
        return (f"{language} has no tokenizer.json: whether its ids mean what the teacher's do is not known",)
    theirs, own = tokenizer_json(teacher), tokenizer_json(language)
    try:
        check_shared_tokenizer(theirs, own)
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(
            f"its embeddings are of other ids than those of --like ({error}); take a language model of the same "
            "tokenizer"
        ) from error
    lacking = lacking_ids(theirs, own)
    some = ", ".join(list(lacking.values())[:4])
    return (f"{len(lacking)} of the teacher's tokens ({some}) are none of {language}: untrained",) if lacking else ()


def config_of(path: Path) -> Any:
    """Raises ModelError for one that transformers does not know."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"its config cannot be read: {str(error).splitlines()[0]}") from error


def vision_config(path: Path) -> Any:
    """Of a vision tower, or of the vision part of a checkpoint that has a text part as well (CLIP, SigLIP)."""
    config = config_of(path)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"a whole vision-language model ({config.model_type}); name the vision tower that it is made of"
        )
    return config.vision_config if "vision_config" in config.sub_configs else config


def check_vision(config: Any, layer: int, window: int) -> None:
    """Before any weights. Raises ModelError for what is no vision transformer, UsageError for a layer or a window that
    it does not have."""
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ModelError(f"a {config.model_type} has no image_size and patch_size: not a vision transformer")
    if not isinstance(config.image_size, int):
        raise ModelError(f"its tiles are of {config.image_size} pixels; expected one number, the side of a square")
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
    config = config_of(path)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"a {config.model_type}, which is no language model")
    text, unused = loaded(AutoModelForCausalLM, path)
    if unused:
        raise ModelError(f"it has weights that a {type(text).__name__} lacks: {unused}; not a language model alone")
    head = text.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or not hasattr(text, "lm_head") or head.bias is not None:
        raise ModelError(f"a {type(text).__name__} has no linear lm_head without a bias, which a LLaVA-NeXT has")
    return text


def loaded(kind: Any, path: Path, **options: Any) -> tuple[Any, dict[str, int]]:
    """A model with all of its weights, and how many others the checkpoint has, by the first part of their names."""
    try:
        with _quiet():
            model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"it cannot be loaded: {str(error).splitlines()[0]}") from error
    lacking = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if lacking:
        raise ModelError(f"{len(lacking)} weights of a {type(model).__name__} are missing, as {lacking[:3]}")
    return model, dict(Counter(str(name).partition(".")[0] for name in report["unexpected_keys"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report of transformers: what is missing is an error here, and what is not used is returned."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def image_processor(path: Path) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            "it has no image processor (preprocessor_config.json), which says what colours it was made for; put it "
            "beside the weights"
        ) from error


@torch.no_grad()
def feature_strategy(tower: Any) -> Literal["default", "full"]:
    """What LLaVA calls it: "full" takes all tokens of the tower, "default" leaves out a first one that is no patch."""
    size, patch = tower.config.image_size, tower.config.patch_size
    given = torch.zeros(1, 3, size, size, dtype=tower.dtype)
    extra = int(tower(pixel_values=given).last_hidden_state.shape[1]) - (size // patch) ** 2
    if extra not in (0, 1):
        raise ModelError(f"a {type(tower).__name__} has {extra} tokens besides its patches: not supported")
    return "default" if extra else "full"
