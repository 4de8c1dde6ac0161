"""Vision-language models with fewer vision tokens: the projector's output is averaged over windows of R x R.

The config holds R (`vision_pool`); weights, their shapes and their names are the family's. This file is saved beside
each such model, so that it loads without emkd:

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

It imports only torch and transformers. Shape legend: N tiles, H x H their tokens, d hidden size
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel


def pool_tokens(features: torch.Tensor, window: int) -> torch.Tensor:
    """Average windows of a square grid: [N, H·H, d] -> [N, (H/window)², d], row by row.

    Raises ValueError if the grid is not square, or the window does not divide its side.
    """
    n, tokens, width = features.shape
    side = int(tokens**0.5)
    if side * side != tokens or side % window:
        raise ValueError(
            f"cannot pool {tokens} vision tokens in windows of {window} x {window}: a square grid is needed whose "
            f"side is a multiple of {window}"
        )
    grid = features.reshape(n, side // window, window, side // window, window, width)
    return grid.mean(dim=(2, 4)).reshape(n, -1, width)


def average(projector: torch.nn.Module, window: int) -> None:
    """Average the outputs [N, H·H, d] of a projector from now on."""
    projector.register_forward_hook(partial(_averaged, window))


def _averaged(window: int, projector: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return pool_tokens(output, window)


@contextmanager
def coarser_grid(config: Any) -> Iterator[None]:
    """While open, the config's patches are R times as large.

    LLaVA-NeXT joins tiles by the number of patches along a tile's side, which must be that of its averaged tokens.
    """
    vision, size = config.vision_config, config.vision_config.patch_size
    vision.patch_size = size * config.vision_pool
    try:
        yield
    finally:
        vision.patch_size = size


class PooledLlavaConfig(LlavaConfig):
    """LlavaConfig and `vision_pool`, the side R of the window that becomes one vision token."""

    model_type = "llava_pooled"
    vision_pool: int = 1


class PooledLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA that averages R x R vision tokens into one."""

    config_class = PooledLlavaConfig

    def __init__(self, config: PooledLlavaConfig) -> None:
        super().__init__(config)
        average(self.model.multi_modal_projector, config.vision_pool)


class PooledLlavaNextConfig(LlavaNextConfig):
    """LlavaNextConfig and `vision_pool`."""

    model_type = "llava_next_pooled"
    vision_pool: int = 1


class PooledLlavaNextModel(LlavaNextModel):
    """Averages tiles, then joins them, cuts off the image's padding and adds newline tokens."""

    config_class = PooledLlavaNextConfig

    def __init__(self, config: PooledLlavaNextConfig) -> None:
        super().__init__(config)
        average(self.multi_modal_projector, config.vision_pool)

    def pack_image_features(self, *args: Any, **kwargs: Any) -> Any:
        with coarser_grid(self.config):
            return super().pack_image_features(*args, **kwargs)


class PooledLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT that averages R x R vision tokens of a tile into one."""

    config_class = PooledLlavaNextConfig

    def __init__(self, config: PooledLlavaNextConfig) -> None:
        super().__init__(config)
        self.model = PooledLlavaNextModel(config)
        self.post_init()


class PooledLlavaOnevisionConfig(LlavaOnevisionConfig):
    """LlavaOnevisionConfig and `vision_pool`."""

    model_type = "llava_onevision_pooled"
    vision_pool: int = 1


class PooledLlavaOnevisionModel(LlavaOnevisionModel):
    """As PooledLlavaNextModel, for images only: the family pools videos itself, which is not supported here."""

    config_class = PooledLlavaOnevisionConfig

    def __init__(self, config: PooledLlavaOnevisionConfig) -> None:
        super().__init__(config)
        average(self.multi_modal_projector, config.vision_pool)

    def pack_image_features(self, *args: Any, **kwargs: Any) -> Any:
        with coarser_grid(self.config):
            return super().pack_image_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a LLaVA-OneVision that averages its vision tokens takes images, not videos")


class PooledLlavaOnevisionForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that averages R x R vision tokens of a tile into one."""

    config_class = PooledLlavaOnevisionConfig

    def __init__(self, config: PooledLlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.model = PooledLlavaOnevisionModel(config)
        self.post_init()


class PooledInternVLConfig(InternVLConfig):
    """InternVLConfig and `vision_pool`."""

    model_type = "internvl_pooled"
    vision_pool: int = 1


class PooledInternVLForConditionalGeneration(InternVLForConditionalGeneration):
    """InternVL that averages R x R vision tokens of a tile into one."""

    config_class = PooledInternVLConfig

    def __init__(self, config: PooledInternVLConfig) -> None:
        super().__init__(config)
        average(self.model.multi_modal_projector, config.vision_pool)


class PooledIdefics3Config(Idefics3Config):
    """Idefics3Config and `vision_pool`."""

    model_type = "idefics3_pooled"
    vision_pool: int = 1


class PooledIdefics3ForConditionalGeneration(Idefics3ForConditionalGeneration):
    """Idefics3 that averages R x R vision tokens of a tile into one."""

    config_class = PooledIdefics3Config

    def __init__(self, config: PooledIdefics3Config) -> None:
        super().__init__(config)
        average(self.model.connector, config.vision_pool)


class PooledSmolVLMConfig(SmolVLMConfig):
    """SmolVLMConfig and `vision_pool`."""

    model_type = "smolvlm_pooled"
    vision_pool: int = 1


class PooledSmolVLMForConditionalGeneration(SmolVLMForConditionalGeneration):
    """SmolVLM that averages R x R vision tokens of a tile into one."""

    config_class = PooledSmolVLMConfig

    def __init__(self, config: PooledSmolVLMConfig) -> None:
        super().__init__(config)
        average(self.model.connector, config.vision_pool)


POOLED_CLASSES: tuple[Any, ...] = (
    PooledLlavaForConditionalGeneration,
    PooledLlavaNextForConditionalGeneration,
    PooledLlavaOnevisionForConditionalGeneration,
    PooledInternVLForConditionalGeneration,
    PooledIdefics3ForConditionalGeneration,
    PooledSmolVLMForConditionalGeneration,
)

for _class in POOLED_CLASSES:
    # This file is saved with the model, and the model names it.
    _class.config_class.register_for_auto_class()
    _class.register_for_auto_class("AutoModelForImageTextToText")
    # Checkpoints keep the family's own names on disk: without its mapping, weights would not be found.
    _pooled_type = _class.config_class.model_type
    _mapping = get_checkpoint_conversion_mapping(_pooled_type.removesuffix("_pooled"))
    if _mapping is not None:
        register_checkpoint_conversion_mapping(_pooled_type, _mapping, overwrite=True)
