"""The settings by which a processor counts the vision tokens of an image, and the model makes them."""

from collections.abc import Iterator
from typing import Any

from emkd.errors import ModelError
from emkd.vlm.loading import VisionLanguageModel

PROCESSORS = (
    "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_len", "image_seq_length",
)  # fmt: skip
MODELS = (
    "vision_feature_select_strategy", "vision_feature_layer", "image_seq_length", "downsample_ratio", "scale_factor",
)  # fmt: skip
TOWERS = ("patch_size", "image_size", "spatial_merge_size")


def check_counting(vlm: VisionLanguageModel) -> None:
    """Raise ModelError if the processor lacks the size of a patch, without which it cannot count vision tokens."""
    processor = vlm.processor
    if not hasattr(processor, "patch_size") or processor.patch_size is not None:
        return
    tower = getattr(getattr(vlm.model.config, "vision_config", None), "patch_size", None)
    said = f"; the config's vision_config.patch_size is {tower}" if tower is not None else ""
    raise ModelError(
        f"{vlm.path}: its processor has no patch_size, and cannot count the vision tokens of an image{said}. Set "
        f'"patch_size": {tower if tower is not None else "..."} in processor_config.json'
    )


def counting_settings(vlm: VisionLanguageModel) -> str:
    """Return what processor and model say about the number of vision tokens, for an error about it."""
    config = vlm.model.config
    tower = getattr(config, "vision_config", None)
    model = [*_values(config, MODELS, ""), *_values(tower, TOWERS, "vision_config.")]
    return (
        f"processor_config.json has {_listed(_values(vlm.processor, PROCESSORS, ''))}; config.json has "
        f"{_listed(model)}. Make them count the same number of vision tokens"
    )


def _values(held: Any, names: tuple[str, ...], prefix: str) -> Iterator[str]:
    for name in names:
        if getattr(held, name, None) is not None:
            yield f"{prefix}{name} {getattr(held, name)}"


def _listed(values: Any) -> str:
    return ", ".join(values) or "nothing about it"
