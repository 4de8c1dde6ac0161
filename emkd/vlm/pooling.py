"""Students with fewer vision tokens, of any family that allows it without changing the shapes of its weights.

    llava, llava_next, llava_onevision, internvl, idefics3, smolvlm   `pooled_models`: averages each tile of the
                                                                      projector's output
    qwen2_vl, qwen2_5_vl, qwen3_vl                                    `pooled_qwen`: averages an image's own grid
    gemma3                                                            its own `mm_tokens_per_image`: the family's own
                                                                      code averages before the projector

`FAMILIES` has one entry for each. The processor changes with the model, so that it writes as many placeholders as there
are vision tokens left; both save what they were changed to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from emkd.errors import ModelError, UsageError
from emkd.vlm.pooled_models import (
    PooledIdefics3ForConditionalGeneration,
    PooledInternVLForConditionalGeneration,
    PooledLlavaForConditionalGeneration,
    PooledLlavaNextForConditionalGeneration,
    PooledLlavaOnevisionForConditionalGeneration,
    PooledSmolVLMForConditionalGeneration,
)
from emkd.vlm.pooled_qwen import POOLED_QWENS

SUFFIX = "_pooled"


def family_of(model_type: str) -> str:
    """Return the family of a model type, pooled or not."""
    return model_type.removesuffix(SUFFIX)


def pooled(model: Any, processor: Any, window: int) -> Any:
    """Return the model with vision pooling and every weight kept; change its processor in place to match.

    window: R; a model that pools already must have the same

    Raises UsageError if the window does not fit the model, ModelError if its family cannot be pooled.
    """
    present = model.config.to_dict().get("vision_pool", 1)
    if window == present:
        return model
    if present != 1:
        raise UsageError(
            f"--vision-pool {window}: this student averages {present} x {present} tokens already, and its projector "
            "was trained with those; leave --vision-pool out, or start from the student before pooling"
        )
    name = model.config.model_type
    family = FAMILIES.get(name)
    if family is None:
        raise ModelError(
            f"--vision-pool works on models of type {', '.join(FAMILIES)}, not on {name!r}; train it with all of its "
            "vision tokens"
        )
    side = window if family.side is None else family.side(model.config)
    if side % window:
        raise UsageError(
            f"--vision-pool {window} does not divide this model's grid of {side} x {side} vision tokens; "
            "choose a divisor of its side"
        )
    student = _with_config(model, family, _pooled_config(model.config, family, window))
    family.change_processor(processor, window)
    return student


def own_code(model_type: str) -> str | None:
    """Return the name of the file that is saved with models of this type, because they need its code.

    None for models of transformers.
    """
    family = FAMILIES.get(family_of(model_type)) if model_type.endswith(SUFFIX) else None
    if family is None or family.model_class is None:
        return None
    return f"{family.model_class.__module__.rpartition('.')[2]}.py"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How models of one family get fewer vision tokens.

    change_processor: makes a processor write as many placeholders as there are tokens left; called with R
    model_class:      the pooled class; None if the family's own class averages
    token_counts:     fields of its config that count the vision tokens of an image, or of a tile
    side:             vision tokens along a tile's side before they are averaged, from the config; None if an image has
                      a grid of any shape, which takes any window
    """

    change_processor: Callable[[Any, int], None]
    model_class: Any = None
    token_counts: tuple[str, ...] = ()
    side: Callable[[Any], int] | None = None


def _patches(config: Any) -> int:
    """Patches along a tile's side. Raises ModelError for a vision tower that takes an image in its own shape."""
    if config.vision_config.model_type == "pixtral":
        raise ModelError(
            "--vision-pool averages square tiles, and a pixtral vision tower takes an image in its own shape; train "
            "the model with all of its vision tokens"
        )
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    return int(size[0] // patch[0]) if isinstance(size, list | tuple) else int(size // patch)


def _larger_patches(processor: Any, window: int) -> None:
    processor.patch_size = processor.patch_size * window


def _fewer(name: str) -> Callable[[Any, int], None]:
    def change(processor: Any, window: int) -> None:
        setattr(processor, name, getattr(processor, name) // window**2)

    return change


def _fewer_in_gemma3(processor: Any, window: int) -> None:
    """Gemma 3's processor keeps the text for an image that it composed when it was made."""
    tokens = processor.image_seq_length // window**2
    token = processor.tokenizer.image_token
    processor.full_image_sequence = processor.full_image_sequence.replace(
        token * processor.image_seq_length, token * tokens
    )
    processor.image_seq_length = tokens


def _averaging(kind: Any) -> Callable[[Any, int], None]:
    def change(processor: Any, window: int) -> None:
        processor.__class__, processor.vision_pool = kind, window  # in place: an Encoder may hold it already

    return change


FAMILIES: dict[str, Family] = {
    "llava": Family(
        model_class=PooledLlavaForConditionalGeneration,
        side=_patches,
        change_processor=_larger_patches,
    ),
    "llava_next": Family(
        model_class=PooledLlavaNextForConditionalGeneration,
        side=_patches,
        change_processor=_larger_patches,
    ),
    "llava_onevision": Family(
        model_class=PooledLlavaOnevisionForConditionalGeneration,
        side=_patches,
        change_processor=_fewer("num_image_tokens"),
    ),
    "internvl": Family(
        model_class=PooledInternVLForConditionalGeneration,
        side=lambda config: round(_patches(config) * config.downsample_ratio),
        token_counts=("image_seq_length",),
        change_processor=_fewer("image_seq_length"),
    ),
    "idefics3": Family(
        model_class=PooledIdefics3ForConditionalGeneration,
        side=lambda config: _patches(config) // config.scale_factor,
        change_processor=_fewer("image_seq_len"),
    ),
    "smolvlm": Family(
        model_class=PooledSmolVLMForConditionalGeneration,
        side=lambda config: _patches(config) // config.scale_factor,
        change_processor=_fewer("image_seq_len"),
    ),
    "gemma3": Family(
        side=lambda config: round(config.mm_tokens_per_image**0.5),
        token_counts=("mm_tokens_per_image",),
        change_processor=_fewer_in_gemma3,
    ),
    **{
        family_of(model.config_class.model_type): Family(model_class=model, change_processor=_averaging(processor))
        for model, processor in POOLED_QWENS
    },
}


def _pooled_config(config: Any, family: Family, window: int) -> Any:
    """The family's config with `vision_pool`, and with fewer tokens in the fields that count them."""
    settings = config.to_dict()
    settings |= {name: settings[name] // window**2 for name in family.token_counts}
    if family.model_class is None:
        return type(config)(**settings, vision_pool=window)
    kind = family.model_class.config_class
    return kind(**{**settings, "model_type": kind.model_type, "vision_pool": window})


def _with_config(model: Any, family: Family, config: Any) -> Any:
    """A model with another config that has exactly this model's weights: it takes over their memory."""
    kind = family.model_class or type(model)
    with torch.device("meta"):
        student = kind._from_config(config, dtype=model.dtype)
    student.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, buffer in model.named_buffers():  # those that no checkpoint has, too
        module, _, own = name.rpartition(".")
        setattr(student.get_submodule(module), own, buffer)
    student.tie_weights()
    student.generation_config = model.generation_config
    return student.train(model.training)


for _kind in (family.model_class for family in FAMILIES.values() if family.model_class is not None):
    AutoConfig.register(_kind.config_class.model_type, _kind.config_class, exist_ok=True)
    AutoModelForImageTextToText.register(_kind.config_class, _kind, exist_ok=True)
for _model, _processor in POOLED_QWENS:
    AutoProcessor.register(_model.config_class, _processor, exist_ok=True)
