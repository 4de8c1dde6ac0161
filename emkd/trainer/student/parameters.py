"""Which parameters of a student learn, and how fast: modules are named by the beginning of their parameters' names.

Such a beginning is a plain one, here and in lora.py: `model.vision` is in `model.vision_tower.embeddings.weight`.
A parameter that two modules share (an LM head tied to the embeddings) has both names, and either one names it.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from emkd.errors import UsageError


def freeze(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Parameters whose names begin with one of the prefixes do not learn. UsageError for one that names none."""
    for prefix in prefixes:
        for parameter in parameters_below(model, prefix, "freeze"):
            parameter.requires_grad_(False)


def parameters_below(model: nn.Module, prefix: str, setting: str) -> list[nn.Parameter]:
    """Parameters whose names begin so. UsageError, which names the setting, where there are none."""
    found = [parameter for name, parameter in all_names(model) if name.startswith(prefix)]
    if not found:
        raise UsageError(
            f"{setting} {prefix!r}: no parameter's name begins so; there are {', '.join(top_names(model))}. Families "
            "name their modules differently: docs/families.md has a table"
        )
    return found


def all_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters with their names; a shared one is there under each of its names."""
    return list(model.named_parameters(remove_duplicate=False))


def top_names(model: nn.Module) -> list[str]:
    """The first two parts of all parameters' names: what can sensibly be frozen or have a learning rate."""
    return sorted({".".join(name.split(".")[:2]) for name, _ in all_names(model)})


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], decay: Container[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: each parameter that learns is in exactly one of them.

    learning_rates: by prefix; the longest one that a parameter's name begins with decides
    decay:          names of the parameters that decay, with `weight_decay`

    Parameters without a prefix have no "lr", which leaves them the optimizer's own; their groups come first, because
    Trainer logs the learning rate of the first group. Raises UsageError for a prefix that names no parameter, or only
    such as do not learn.
    """
    for prefix in learning_rates:
        _check_some_learn(prefix, parameters_below(model, prefix, "student.learning_rates"))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for names, parameter in _learning(model):
        longest = _longest(learning_rates, names)
        rate = _OPTIMIZERS_OWN if longest is None else learning_rates[longest]
        groups.setdefault((rate, any(name in decay for name in names)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != _OPTIMIZERS_OWN, item[0]))
    return [_group(rate, weight_decay if decays else 0.0, found) for (rate, decays), found in ordered]


# Stands for "no learning rate of its own": rates of a recipe are above 0.
_OPTIMIZERS_OWN = -1.0


def _group(rate: float, weight_decay: float, parameters: list[nn.Parameter]) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    return group if rate == _OPTIMIZERS_OWN else {**group, "lr": rate}


def _learning(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Parameters that learn, each once, with all their names."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in all_names(model):
        if parameter.requires_grad:
            found.setdefault(parameter, []).append(name)
    return [(names, parameter) for parameter, names in found.items()]


def _longest(prefixes: Iterable[str], names: Collection[str]) -> str | None:
    """The longest of the prefixes that one of the names begins with."""
    return max((prefix for prefix in prefixes if any(n.startswith(prefix) for n in names)), key=len, default=None)


def _check_some_learn(prefix: str, parameters: list[nn.Parameter]) -> None:
    if any(parameter.requires_grad for parameter in parameters):
        return
    n_frozen = sum(parameter.numel() for parameter in parameters)
    raise UsageError(
        f"student.learning_rates {prefix!r}: all of the {n_frozen:,} parameters whose names begin so are frozen "
        "(student.freeze, student.lora.modules) and will not learn at any rate; remove this learning rate, or let "
        "them learn"
    )


def n_parameters(model: nn.Module, *, learning: bool = False) -> int:
    """Numbers in all parameters, or in those that learn; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not learning)


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are saved with a model, by name: running statistics and the like, which no optimizer sees."""
    parameters = {name for name, _ in all_names(model)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def fill(model_tensors: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """Copies tensors over those of the same names. What does not agree is said, one line each, and nothing copied."""
    differing = [f"{name} is missing" for name in sorted(model_tensors.keys() - found.keys())]
    differing += [f"{name} is too many" for name in sorted(found.keys() - model_tensors.keys())]
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
