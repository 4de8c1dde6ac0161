"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with fewer vision tokens: averaged over windows of R x R of an image's own grid.

A grid may have any height and width: a window at its lower or right edge may hold fewer tokens, and becomes their mean.
The averaged tokens have the positions (M-RoPE) of an image of that size; Qwen3-VL's deepstack features are averaged the
same way. This file is saved beside each such model, so that it loads without emkd:

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)

It imports only torch and transformers. It takes images and refuses videos. Shape legend: t frames (1), h x w vision
tokens of an image before they are averaged, d hidden size
"""

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel


def pool_grid(features: torch.Tensor, grid: tuple[int, int, int], window: int) -> torch.Tensor:
    """Average windows: [t·h·w, d] -> [t·ceil(h/window)·ceil(w/window), d], row by row. grid: (t, h, w)"""
    frames, height, width = grid
    planes = features.reshape(frames, height, width, -1).permute(0, 3, 1, 2)
    means = torch.nn.functional.avg_pool2d(planes, window, ceil_mode=True, count_include_pad=False)
    return means.permute(0, 2, 3, 1).reshape(-1, features.shape[-1])


class AveragedGrids:
    """Mixin for the base model of a Qwen: averages image features, and gives them the positions of the smaller grid."""

    config: Any
    visual: Any

    def _grids(self, image_grid_thw: torch.Tensor) -> list[tuple[int, int, int]]:
        """Convert grids in patches to (t, h, w) in vision tokens."""
        merge = self.visual.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in image_grid_thw.tolist()]

    def get_image_features(self, pixel_values: Any, image_grid_thw: Any = None, **kwargs: Any) -> Any:
        found = super().get_image_features(pixel_values, image_grid_thw, **{**kwargs, "return_dict": True})  # type: ignore[misc]
        grids, window = self._grids(image_grid_thw), self.config.vision_pool

        def averaged(images: Any) -> tuple[torch.Tensor, ...]:
            return tuple(pool_grid(image, grid, window) for image, grid in zip(images, grids, strict=True))

        found.pooler_output = averaged(found.pooler_output)
        if "deepstack_features" in found:
            found.deepstack_features = [averaged(layer) for layer in found.deepstack_features]
        return found

    def get_rope_index(self, *args: Any, image_grid_thw: Any = None, **kwargs: Any) -> Any:
        if image_grid_thw is not None:
            patches = self.visual.spatial_merge_size * self.config.vision_pool
            left = -(-image_grid_thw[:, 1:] // patches) * self.visual.spatial_merge_size
            image_grid_thw = torch.cat([image_grid_thw[:, :1], left], dim=1)
        return super().get_rope_index(*args, image_grid_thw=image_grid_thw, **kwargs)  # type: ignore[misc]

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a Qwen that averages its vision tokens takes images, not videos")


class AveragedPlaceholders:
    """Mixin for the processor of a Qwen: writes as many placeholders as there are tokens left. vision_pool: R"""

    image_token: str
    image_processor: Any

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: Any = None,
        vision_pool: int = 1,
        **kwargs: Any,
    ) -> None:
        self.vision_pool = vision_pool
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)  # type: ignore[call-arg]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        frames, *sides = image_inputs["image_grid_thw"][image_idx].tolist()
        height, width = (-(-side // (self.image_processor.merge_size * self.vision_pool)) for side in sides)
        return self.image_token * (frames * height * width)


class PooledQwen2VLConfig(Qwen2VLConfig):
    """Qwen2VLConfig and `vision_pool`, the side R of the window that becomes one vision token."""

    model_type = "qwen2_vl_pooled"
    vision_pool: int = 1


class PooledQwen2VLModel(AveragedGrids, Qwen2VLModel):
    config_class = PooledQwen2VLConfig


class PooledQwen2VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Qwen2-VL that averages R x R vision tokens into one."""

    config_class = PooledQwen2VLConfig

    def __init__(self, config: PooledQwen2VLConfig) -> None:
        super().__init__(config)
        self.model = PooledQwen2VLModel(config)
        self.post_init()


class PooledQwen2VLProcessor(AveragedPlaceholders, Qwen2VLProcessor):
    """Qwen2-VL's processor, for `PooledQwen2VLForConditionalGeneration`."""


class PooledQwen2_5_VLConfig(Qwen2_5_VLConfig):
    """Qwen2_5_VLConfig and `vision_pool`."""

    model_type = "qwen2_5_vl_pooled"
    vision_pool: int = 1


class PooledQwen2_5_VLModel(AveragedGrids, Qwen2_5_VLModel):
    config_class = PooledQwen2_5_VLConfig


class PooledQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that averages R x R vision tokens into one."""

    config_class = PooledQwen2_5_VLConfig

    def __init__(self, config: PooledQwen2_5_VLConfig) -> None:
        super().__init__(config)
        self.model = PooledQwen2_5_VLModel(config)
        self.post_init()


class PooledQwen2_5_VLProcessor(AveragedPlaceholders, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor, for `PooledQwen2_5_VLForConditionalGeneration`."""


class PooledQwen3VLConfig(Qwen3VLConfig):
    """Qwen3VLConfig and `vision_pool`."""

    model_type = "qwen3_vl_pooled"
    vision_pool: int = 1


class PooledQwen3VLModel(AveragedGrids, Qwen3VLModel):
    config_class = PooledQwen3VLConfig


class PooledQwen3VLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL that averages R x R vision tokens into one."""

    config_class = PooledQwen3VLConfig

    def __init__(self, config: PooledQwen3VLConfig) -> None:
        super().__init__(config)
        self.model = PooledQwen3VLModel(config)
        self.post_init()


class PooledQwen3VLProcessor(AveragedPlaceholders, Qwen3VLProcessor):
    """Qwen3-VL's processor, for `PooledQwen3VLForConditionalGeneration`."""


# (model, processor)
POOLED_QWENS: tuple[tuple[Any, Any], ...] = (
    (PooledQwen2VLForConditionalGeneration, PooledQwen2VLProcessor),
    (PooledQwen2_5_VLForConditionalGeneration, PooledQwen2_5_VLProcessor),
    (PooledQwen3VLForConditionalGeneration, PooledQwen3VLProcessor),
)

for _class, _processor in POOLED_QWENS:
    # This file is saved with the model and its processor, and they name it.
    _class.config_class.register_for_auto_class()
    _class.register_for_auto_class("AutoModelForImageTextToText")
    _processor.register_for_auto_class()
    # Checkpoints keep the family's own names on disk: without its mapping, weights would not be found.
    _pooled_type = _class.config_class.model_type
    _mapping = get_checkpoint_conversion_mapping(_pooled_type.removesuffix("_pooled"))
    if _mapping is not None:
        register_checkpoint_conversion_mapping(_pooled_type, _mapping, overwrite=True)
