"""Students with fewer vision tokens, of any family that allows it without changing the shapes of its weights.

    llava, llava_next, llava_onevision, internvl, idefics3, smolvlm   `pooled_models`: each tile of what the projector
                                                                      gives is averaged
    qwen2_vl, qwen2_5_vl, qwen3_vl                                    `pooled_qwen`: the same of a picture's own grid
    gemma3                                                            its own `mm_tokens_per_image`: averaged before
                                                                      the projector, by the family's own code

The processor is changed along, so that it writes as many placeholders as there are tokens left; both save what they
were changed to.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from emkd.errors import ModelError, UsageError
from emkd.vlm.pooled_models import POOLED_CLASSES
from emkd.vlm.pooled_qwen import POOLED_QWENS

SUFFIX = "_pooled"


def family_of(model_type: str) -> str:
    """The family of a model's type, pooled or not."""
    return model_type.removesuffix(SUFFIX)


def _family(kind: Any) -> str:
    return family_of(str(kind.config_class.model_type))


_CLASSES: dict[str, Any] = {_family(kind): kind for kind in (*POOLED_CLASSES, *(model for model, _ in POOLED_QWENS))}


def pooled(model: Any, processor: Any, window: int) -> Any:
    """The model with vision pooling, every weight kept; its processor is changed in place to match.

    window: R; a model that pools already has to have the same. Raises UsageError, ModelError.
    """
    present = model.config.to_dict().get("vision_pool", 1)
    if window == present:
        return model
    if present != 1:
        raise UsageError(
            f"--vision-pool {window}: this student averages {present} x {present} tokens already, "
            "and its projector learned with those; leave --vision-pool out, or begin with the student of before"
        )
    family = model.config.model_type
    if family not in _PROCESSORS:
        raise ModelError(
            f"--vision-pool works on models of type {', '.join(_PROCESSORS)}, not on {family!r}; train it with the "
            "vision tokens that it has"
        )
    side = _SIDES[family](model.config) if family in _SIDES else window
    if side % window:
        raise UsageError(
            f"--vision-pool {window} does not divide this model's grid of {side} x {side} vision tokens; "
            "choose a divisor of its side"
        )
    student = _with_config(model, _pooled_config(model.config, window))
    _PROCESSORS[family](processor, window)
    return student


def own_code(model_type: str) -> str | None:
    """Name of the file that is saved beside models of this type, whose code they need; None for those of
    transformers."""
    kind = _CLASSES.get(family_of(model_type)) if model_type.endswith(SUFFIX) else None
    return None if kind is None else f"{kind.__module__.rpartition('.')[2]}.py"


def _pooled_config(config: Any, window: int) -> Any:
    """The family's config with `vision_pool`, and with the number of tokens where it names one."""
    family, settings = config.model_type, config.to_dict()
    settings |= {name: settings[name] // window**2 for name in _COUNTS.get(family, ())}
    if family not in _CLASSES:
        return type(config)(**settings, vision_pool=window)
    kind = _CLASSES[family]
    settings |= {"model_type": kind.config_class.model_type, "vision_pool": window}
    return kind.config_class(**settings)


def _with_config(model: Any, config: Any) -> Any:
    """A model of another config that has the very weights of this one: their memory becomes its own."""
    kind = _CLASSES.get(model.config.model_type, type(model))
    with torch.device("meta"):
        student = kind._from_config(config, dtype=model.dtype)
    student.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, buffer in model.named_buffers():  # those that no checkpoint has, too
        module, _, own = name.rpartition(".")
        setattr(student.get_submodule(module), own, buffer)
    student.tie_weights()
    student.generation_config = model.generation_config
    return student.train(model.training)


# Fields of a config that count an image's (or a tile's) vision tokens.
_COUNTS = {"internvl": ("image_seq_length",), "gemma3": ("mm_tokens_per_image",)}


def _patches(config: Any) -> int:
    """Patches of a tile's side. ModelError for a tower that takes a picture in its own shape."""
    if config.vision_config.model_type == "pixtral":
        raise ModelError(
            "--vision-pool averages square tiles, and a pixtral vision tower takes a picture in its own shape; train "
            "it with the vision tokens that it has"
        )
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    return int(size[0] // patch[0]) if isinstance(size, list | tuple) else int(size // patch)


# Vision tokens of a tile's side, before they are averaged; Qwens have no tiles, and take any window.
_SIDES: dict[str, Callable[[Any], int]] = {
    "llava": _patches,
    "llava_next": _patches,
    "llava_onevision": _patches,
    "internvl": lambda config: round(_patches(config) * config.downsample_ratio),
    "idefics3": lambda config: _patches(config) // config.scale_factor,
    "smolvlm": lambda config: _patches(config) // config.scale_factor,
    "gemma3": lambda config: round(config.mm_tokens_per_image**0.5),
}


def _larger_patches(processor: Any, window: int) -> None:
    processor.patch_size = processor.patch_size * window


def _fewer(name: str) -> Callable[[Any, int], None]:
    def change(processor: Any, window: int) -> None:
        setattr(processor, name, getattr(processor, name) // window**2)

    return change


def _fewer_in_gemma3(processor: Any, window: int) -> None:
    """What stands for an image is written down when the processor is made."""
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


# What makes a processor write as many placeholders as there are tokens.
_PROCESSORS: dict[str, Callable[[Any, int], None]] = {
    "llava": _larger_patches,
    "llava_next": _larger_patches,
    "llava_onevision": _fewer("num_image_tokens"),
    "internvl": _fewer("image_seq_length"),
    "idefics3": _fewer("image_seq_len"),
    "smolvlm": _fewer("image_seq_len"),
    "gemma3": _fewer_in_gemma3,
    **{_family(model): _averaging(processor) for model, processor in POOLED_QWENS},
}

for _class in _CLASSES.values():
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    AutoModelForImageTextToText.register(_class.config_class, _class, exist_ok=True)
for _model, _processor in POOLED_QWENS:
    AutoProcessor.register(_model.config_class, _processor, exist_ok=True)
