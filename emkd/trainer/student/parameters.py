"""Which parameters of a student are trained, and at which learning rate. Prefixes of parameter names select modules.

A prefix is a plain string prefix, here and in lora.py: `model.vision` matches `model.vision_tower.embeddings.weight`.
A parameter that two modules share (an LM head tied to the embeddings) has both names; a prefix of either matches it.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from emkd.errors import UsageError


def freeze(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Freeze the parameters that one of the prefixes matches. Raises UsageError for a prefix that matches none."""
    for prefix in prefixes:
        for parameter in parameters_below(model, prefix, "freeze"):
            parameter.requires_grad_(False)


def parameters_below(model: nn.Module, prefix: str, setting: str) -> list[nn.Parameter]:
    """Return the parameters that a prefix matches. Raises UsageError, which names the setting, if there are none."""
    found = [parameter for name, parameter in all_names(model) if name.startswith(prefix)]
    if not found:
        raise UsageError(
            f"{setting} {prefix!r}: no parameter's name starts with it; expected one of {', '.join(top_names(model))}, "
            "or a longer one. Module names differ between families: docs/families.md has a table"
        )
    return found


def all_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return all parameters with their names; a shared parameter appears under each of its names."""
    return list(model.named_parameters(remove_duplicate=False))


def top_names(model: nn.Module) -> list[str]:
    """Return the first two parts of all parameter names: the modules that a recipe usually names."""
    return sorted({".".join(name.split(".")[:2]) for name, _ in all_names(model)})


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], decay: Container[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer; each trainable parameter is in exactly one of them.

    learning_rates: by prefix; the longest prefix that matches a parameter's name decides
    decay:          names of the parameters that `weight_decay` applies to

    Groups of parameters without a prefix come first and have no "lr", so that they get the optimizer's own, which
    Trainer logs. Raises UsageError for a prefix that matches no parameter, or only frozen ones.
    """
    for prefix in learning_rates:
        _check_some_trainable(prefix, parameters_below(model, prefix, "student.learning_rates"))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for names, parameter in _trainable(model):
        longest = _longest(learning_rates, names)
        rate = _OPTIMIZERS_OWN if longest is None else learning_rates[longest]
        groups.setdefault((rate, any(name in decay for name in names)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != _OPTIMIZERS_OWN, item[0]))
    return [_group(rate, weight_decay if decays else 0.0, found) for (rate, decays), found in ordered]


# Stands for "the optimizer's learning rate": rates of a recipe are above 0.
_OPTIMIZERS_OWN = -1.0


def _group(rate: float, weight_decay: float, parameters: list[nn.Parameter]) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    return group if rate == _OPTIMIZERS_OWN else {**group, "lr": rate}


def _trainable(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Return the trainable parameters, each once, with all its names."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in all_names(model):
        if parameter.requires_grad:
            found.setdefault(parameter, []).append(name)
    return [(names, parameter) for parameter, names in found.items()]


def _longest(prefixes: Iterable[str], names: Collection[str]) -> str | None:
    """Return the longest of the prefixes that matches one of the names, or None."""
    return max((prefix for prefix in prefixes if any(n.startswith(prefix) for n in names)), key=len, default=None)


def _check_some_trainable(prefix: str, parameters: list[nn.Parameter]) -> None:
    if any(parameter.requires_grad for parameter in parameters):
        return
    n_frozen = sum(parameter.numel() for parameter in parameters)
    raise UsageError(
        f"student.learning_rates {prefix!r}: all {n_frozen:,} parameters whose names start with it are frozen "
        "(student.freeze, student.lora.modules); remove this learning rate, or do not freeze them"
    )


def n_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters (of scalars), or of trainable ones; shared parameters count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that are saved with a model, by name: running statistics and the like."""
    parameters = {name for name, _ in all_names(model)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def fill(model_tensors: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """Copy `found` into the model's tensors of the same names.

    Returns one line for each name, dtype or shape that differs; if there are any, nothing is copied.
    """
    differing = [f"{name} is missing" for name in sorted(model_tensors.keys() - found.keys())]
    differing += [f"{name} is unexpected" for name in sorted(found.keys() - model_tensors.keys())]
    for name in sorted(model_tensors.keys() & found.keys()):
        here, there = _kind(model_tensors[name]), _kind(found[name])
        if here != there:
            differing.append(f"{name} is {there}, expected {here}")
    if not differing:
        with torch.no_grad():
            for name, tensor in model_tensors.items():
                tensor.copy_(found[name])
    return differing


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
