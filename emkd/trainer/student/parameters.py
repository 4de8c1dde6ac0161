"""Which parameters of a student are trained, and at which learning rate.

A recipe selects modules by the name of a part, which is the same for all families (`vlm/parts.py`), or by a prefix of
parameter names. A prefix is a plain string prefix, here and in lora.py: `model.vision` matches
`model.vision_tower.embeddings.weight`.
A parameter that two modules share (an LM head tied to the embeddings) has both names; a prefix of either matches it.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from emkd.errors import ModelError, UsageError
from emkd.vlm.parts import PARTS, part_prefixes


def freeze(model: nn.Module, modules: Iterable[str]) -> None:
    """Freeze the parameters of modules, named as in a recipe. Raises UsageError for a name that matches none."""
    for module in modules:
        for parameter in parameters_below(model, module, "freeze"):
            parameter.requires_grad_(False)


def parameters_below(model: nn.Module, module: str, setting: str) -> list[nn.Parameter]:
    """Return the parameters of a module, named as in a recipe.

    Raises UsageError, which names the setting, if there are none.
    """
    prefixes = prefixes_of(model, module, setting)
    return [parameter for name, parameter in all_names(model) if name.startswith(prefixes)]


def prefixes_of(model: nn.Module, module: str, setting: str) -> tuple[str, ...]:
    """Return the prefixes of parameter names that a name of a recipe stands for: those of a part, or itself.

    Raises UsageError, which names the setting, if no parameter has one of them.
    """
    if module in PARTS:
        try:
            return part_prefixes(model, module)
        except ModelError as error:
            raise UsageError(f"{setting} {module!r}: {error}. {_expected(model)}") from error
    if not any(name.startswith(module) for name, _ in all_names(model)):
        close = get_close_matches(module, [*PARTS, *top_names(model)], n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(
            f"{setting} {module!r}: no parameter's name starts with it; {meant}Expected one of {', '.join(PARTS)}, "
            f"which are parts of every family. {_expected(model)}"
        )
    return (module,)


def _expected(model: nn.Module) -> str:
    return f"Prefixes of names work as well: {', '.join(top_names(model))}, or longer ones"


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

    learning_rates: by module, named as in a recipe; the longest prefix that matches a parameter's name decides
    decay:          names of the parameters that `weight_decay` applies to

    Groups of parameters without a prefix come first and have no "lr", so that they get the optimizer's own, which
    Trainer logs. Raises UsageError for a module without parameters, or with only frozen ones.
    """
    by_prefix: dict[str, float] = {}
    for module, rate in learning_rates.items():
        _check_some_trainable(module, parameters_below(model, module, "student.learning_rates"))
        for prefix in prefixes_of(model, module, "student.learning_rates"):
            if by_prefix.setdefault(prefix, rate) != rate:
                raise UsageError(
                    f"student.learning_rates {module!r}: {prefix} has the learning rate {by_prefix[prefix]:g} as well, "
                    "by another name; leave one of the two out"
                )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for names, parameter in _trainable(model):
        longest = _longest(by_prefix, names)
        rate = _OPTIMIZERS_OWN if longest is None else by_prefix[longest]
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


def _check_some_trainable(module: str, parameters: list[nn.Parameter]) -> None:
    if any(parameter.requires_grad for parameter in parameters):
        return
    n_frozen = sum(parameter.numel() for parameter in parameters)
    raise UsageError(
        f"student.learning_rates {module!r}: all {n_frozen:,} parameters that it names are frozen "
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
