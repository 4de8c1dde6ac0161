"""LoRA (arXiv 2106.09685): trainable low-rank additions to linear layers whose own weights are frozen. Needs peft.

    y = W x + (alpha / r) · B A dropout(x)        A: [r, in], B: [out, r], both float32; B starts at 0

peft injects its layers into the model in place, so the model keeps its class, its modules and its forward; in memory,
the layer's own weight is `<layer>.base_layer.weight`. Two files are written; the first loads as a model without peft:

    model.safetensors        W + (alpha / r) · B A under the plain names: an ordinary checkpoint
    trainable.safetensors    the trainable parameters, under their names in memory, for exact resume
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from emkd.errors import ModelError, UsageError
from emkd.trainer.recipe.recipe import LoraRecipe
from emkd.trainer.student.parameters import fill, parameters_below, persistent_buffers, prefixes_of, top_names
from emkd.trainer.student.sharding import shards_like

TRAINABLE_NAME = "trainable.safetensors"
ADAPTER = "default"
_SETTING = "student.lora.modules"
BASE = "base_layer"
# In the metadata of TRAINABLE_NAME: the SHA-256 of the weights that the additions belong to.
BASE_KEY = "base_weights_sha256"


def add_lora(model: Any, recipe: LoraRecipe) -> None:
    """Add LoRA to the linear layers below `recipe.modules` except the LM head, and freeze everything else below them.

    Parameters outside of these modules stay trainable or frozen as they were. A is initialized from torch's random
    state. Raises UsageError if peft is missing, a name matches nothing, or there is no linear layer.
    """
    inject, config_class, cast = _peft()
    frozen = [p for module in recipe.modules for p in parameters_below(model, module, _SETTING)]
    layers = linear_layers(model, recipe.modules)
    if not layers:
        raise UsageError(
            f"{_SETTING} {', '.join(recipe.modules)}: they have no linear layer except the LM head; name "
            f"modules that have linear layers, among {', '.join(top_names(model))}"
        )
    trainable = {id(p): p.requires_grad for p in model.parameters()} | {id(p): False for p in frozen}
    config = config_class(r=recipe.r, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=layers)
    training = model.training
    inject(config, model, adapter_name=ADAPTER)
    cast(model, ADAPTER)  # to float32: bfloat16 loses small updates
    for parameter in model.parameters():  # peft freezes all parameters but its own
        parameter.requires_grad_(trainable.get(id(parameter), True))
    model.train(training)


def linear_layers(model: Any, modules: Sequence[str]) -> list[str]:
    """Return the names of the linear layers below `modules`, named as in a recipe, except the LM head."""
    head = model.get_output_embeddings()
    prefixes = tuple(prefix for module in modules for prefix in prefixes_of(model, module, _SETTING))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(
            module, NonDynamicallyQuantizableLinear
        )  # MultiheadAttention uses its weight without calling it
        and module is not head
        and f"{name}.weight".startswith(prefixes)
    ]


def _peft() -> tuple[Any, Any, Any]:
    """Import (inject_adapter_in_model, LoraConfig, cast_adapter_dtype). Raises UsageError."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import cast_adapter_dtype
    except ImportError as error:
        raise UsageError(
            f"student.lora needs peft, which cannot be imported ({error}): pip install 'emkd[lora]', or remove "
            "student.lora from the recipe"
        ) from error
    return inject_adapter_in_model, LoraConfig, cast_adapter_dtype


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with LoRA, by name. They are recognized by their attributes, without importing peft."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, BASE, None), nn.Linear) and hasattr(module, "lora_A")
    }


@torch.no_grad()
def merged_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain model with the additions merged; the model itself is not changed.

    state: the model's state dict, whole

    Sums are computed in float32, one layer at a time, and kept in main memory; all other tensors are the model's own.
    """
    layers = _lora_layers(model)
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, own = _split(name, layers)
        if layer is None:
            merged[name] = tensor
        elif own == f"{BASE}.weight":
            down, up = (state[f"{layer}.{addition}.{ADAPTER}.weight"] for addition in ("lora_A", "lora_B"))
            merged[f"{layer}.weight"] = _sum(tensor, down, up, layers[layer].scaling[ADAPTER]).cpu()
        elif own.startswith(f"{BASE}."):
            merged[f"{layer}.{own.removeprefix(f'{BASE}.')}"] = tensor
    return merged


def _split(name: str, layers: dict[str, Any]) -> tuple[str | None, str]:
    """Split `a.b.base_layer.weight` into (`a.b`, `base_layer.weight`) if `a.b` has LoRA, else return (None, name)."""
    for mark in (f".{BASE}.", ".lora_"):
        layer, found, rest = name.partition(mark)
        if found and layer in layers:
            return layer, mark.removeprefix(".") + rest
    return None, name


def _sum(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return W + (alpha / r) · B A, [out, in] in the dtype of W. down, up: A and B;  scaling: alpha / r"""
    delta: torch.Tensor = (up.float() @ down.float()) * scaling
    return (weight.float() + delta).to(weight.dtype)


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training may change, by name: trainable parameters, and buffers that are saved."""
    buffers = persistent_buffers(model)  # first: a sharded model frees there what a forward pass has gathered
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trainable | buffers


def save_trainable(model: nn.Module, state: Mapping[str, torch.Tensor], folder: Path, base_sha256: str) -> None:
    """Write TRAINABLE_NAME.

    state: the model's state dict, whole;  base_sha256: hash of the weights that the run started from
    """
    tensors = {name: state[name].detach().contiguous() for name in trainable_state(model)}
    save_file(tensors, folder / TRAINABLE_NAME, metadata={BASE_KEY: base_sha256})


def restore_trainable(model: nn.Module, folder: Path, base_sha256: str) -> None:
    """Load TRAINABLE_NAME of a folder into a model that already has the run's frozen weights. Raises ModelError."""
    path = folder / TRAINABLE_NAME
    if not path.is_file():
        raise ModelError(
            f"{folder} has no {TRAINABLE_NAME}: it was saved without student.lora, or is not a checkpoint to resume "
            "from. To start a new run from its merged weights, use it as --student, with another --output"
        )
    try:
        with safe_open(path, framework="pt") as file:
            found_base = (file.metadata() or {}).get(BASE_KEY)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}; resume from another checkpoint") from error
    if found_base != base_sha256:
        raise ModelError(
            f"{path} was trained on other weights than --student has now: the file names SHA-256 "
            f"{str(found_base)[:12]}, --student has {base_sha256[:12]}. Low-rank additions fit only the weights that "
            "they were trained on: restore those, or start a new run"
        )
    tensors = trainable_state(model)
    differing = fill(tensors, shards_like(found, tensors))
    if differing:
        raise ModelError(
            f"{path} does not fit this recipe's student: {len(differing)} tensors differ, for instance "
            f"{'; '.join(differing[:3])}. Resume with the recipe that the run was started with"
        )
