"""LLaVA with fewer vision tokens: the projector's outputs are averaged over windows of R x R.

The factor is in the config (`vision_pool`), so saving, loading, `generate` and resumed training need nothing
but this module to be imported (`emkd.vlm.loading` does). The projector keeps its weights and their names, and
the processor's `patch_size` grows by R, so that it writes as many placeholders as there are tokens left.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector

from emkd.errors import ModelError, UsageError

MODEL_TYPE = "llava_pooled"


class PooledLlavaConfig(LlavaConfig):
    """LlavaConfig and `vision_pool`, the side R of the window that becomes one vision token."""

    model_type = MODEL_TYPE
    vision_pool: int = 1


class PooledProjector(LlavaMultiModalProjector):
    """The projector, then the mean over R x R neighbours: [images, H·W, d] -> [images, H·W / R², d]."""

    def __init__(self, config: PooledLlavaConfig) -> None:
        super().__init__(config)
        self.vision_pool = config.vision_pool

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return pool_tokens(super().forward(image_features), self.vision_pool)


class PooledLlavaModel(LlavaModel):
    """LlavaModel with the pooling projector."""

    config_class = PooledLlavaConfig

    def __init__(self, config: PooledLlavaConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = PooledProjector(config)
        self.post_init()


class PooledLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration over PooledLlavaModel; same weights, same names."""

    config_class = PooledLlavaConfig

    def __init__(self, config: PooledLlavaConfig) -> None:
        super().__init__(config)
        self.model = PooledLlavaModel(config)
        self.post_init()


def pool_tokens(features: torch.Tensor, window: int) -> torch.Tensor:
    """Means over windows of a square grid: [N, H·H, d] -> [N, (H/window)², d], row by row."""
    n, tokens, width = features.shape
    side = int(tokens**0.5)
    if side * side != tokens or side % window:
        raise ModelError(
            f"cannot pool {tokens} vision tokens in windows of {window} x {window}: a square grid is needed whose "
            f"side is a multiple of {window}"
        )
    grid = features.reshape(n, side // window, window, side // window, window, width)
    return grid.mean(dim=(2, 4)).reshape(n, -1, width)


def pooled(model: Any, processor: Any, window: int) -> Any:
    """The model with vision pooling, every weight kept; its processor is changed in place to match.

    window: R; a model that pools already has to have the same. Raises UsageError, ModelError.
    """
    present = getattr(model.config, "vision_pool", 1) if model.config.model_type == MODEL_TYPE else 1
    if window == present:
        return model
    if model.config.model_type == MODEL_TYPE:
        raise UsageError(f"--vision-pool {window}: this student averages {present} x {present} tokens already")
    if model.config.model_type != "llava":
        raise ModelError(
            f"--vision-pool works on models of type llava in this version, not on {model.config.model_type!r}"
        )
    _check_grid(model.config, window)
    config = PooledLlavaConfig(**{**model.config.to_dict(), "model_type": MODEL_TYPE, "vision_pool": window})
    config.architectures = [PooledLlavaForConditionalGeneration.__name__]
    student = PooledLlavaForConditionalGeneration._from_config(config, dtype=model.dtype)
    student.load_state_dict(model.state_dict(), strict=True)
    student.generation_config = model.generation_config
    processor.patch_size = processor.patch_size * window
    return student.to(model.device)


def _check_grid(config: LlavaConfig, window: int) -> None:
    vision: Any = config.vision_config
    side = vision.image_size // vision.patch_size
    if side % window:
        raise UsageError(
            f"--vision-pool {window} does not divide this model's grid of {side} x {side} vision tokens; "
            "choose a divisor of its side"
        )


AutoConfig.register(MODEL_TYPE, PooledLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(PooledLlavaConfig, PooledLlavaForConditionalGeneration, exist_ok=True)
# Checkpoints keep LLaVA's own key names on disk; without its mapping, half the weights would not be found.
register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("llava"), overwrite=True)
