"""Sharded students (torch's FSDP2): each rank keeps a part of every parameter, of its gradient and optimizer state.

    blocks      decoder layers, layers of the vision tower: gathered for their own forward and backward, then freed
    all others  embeddings, LM head, projector, norms: gathered once for each micro-batch, freed after its backward

Matching and losses read the LM head outside of the model's forward. There it is an ordinary parameter, because it is
one of the others, and FSDP2 sums its gradient over the ranks at the end of backward. (A head that is gathered with
`full_tensor()` instead gets the gradient of its own rank's samples: wrong, without an error.)

All ranks have to call the same blocks equally often, or they wait for each other forever; data/stand_in.py
gives a picture to micro-batches that have none.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from emkd.errors import ModelError, UsageError


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model in place over all ranks of the process group, and move its shards to `device`.

    Raises UsageError if there is one rank alone, ModelError if the model cannot be sharded.
    """
    n_ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    check_ranks(n_ranks)
    named = dict(blocks(model))
    _check_groups(model, named)
    mesh = init_device_mesh(device.type, (n_ranks,))
    try:
        for block in named.values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise ModelError(f"{type(model).__name__} cannot be sharded (student.shard): {error}") from error
    check_sharded(model)
    for name, block in named.items():
        _check_calls(model, name, block)


def check_ranks(n_ranks: int) -> None:
    """Raise UsageError for one process, which would train as without sharding."""
    if n_ranks == 1:
        raise UsageError(
            "student.shard (--shard): one process has no other to share its student with; use --workers 2 or more, or "
            "torchrun, or leave it out"
        )


def _check_groups(model: nn.Module, named: Mapping[str, nn.Module]) -> None:
    """Raise UsageError or ModelError for what FSDP2 refuses only in a first step, or does silently."""
    groups = {name: dict(block.named_parameters()) for name, block in named.items()}
    inside = {id(p) for parameters in groups.values() for p in parameters.values()}
    groups["all other modules"] = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    if _shared(model, named):
        raise ModelError("student.shard: a layer shares a parameter with a module outside of it, and cannot be sharded")
    for name, parameters in groups.items():
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values() if p.requires_grad})
        if len(dtypes) > 1:
            raise UsageError(
                f"student.shard: trainable parameters of {name} are of {' and '.join(dtypes)}; use student.dtype: "
                "float32, or freeze those that are not to be trained"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise ModelError(
                f"student.shard: {name} keeps running statistics (BatchNorm), of which each worker would have its own; "
                "train without --shard"
            )


def _shared(model: nn.Module, named: Mapping[str, nn.Module]) -> bool:
    """Whether a parameter of a block is one of another block, too, or of none."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((block for block in named if name.startswith(f"{block}.")), "")
        owners.setdefault(id(parameter), set()).add(owner)
    return any(len(found) > 1 for found in owners.values())


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of the outermost elements of ModuleLists that have parameters."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name in outermost:
        for number, block in enumerate(model.get_submodule(name).children()):
            if any(True for _ in block.parameters()):
                yield f"{name}.{number}", block


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on a model."""
    return isinstance(model, FSDPModule)


def check_sharded(model: nn.Module) -> None:
    """Raise ModelError unless every parameter is divided along its first axis."""
    whole = [
        name
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),)
    ]
    if whole:
        raise ModelError(
            f"student.shard: {len(whole)} parameters are not sharded, for instance {', '.join(whole[:3])}; every rank "
            "would train its own copy of them"
        )


def _check_calls(model: nn.Module, name: str, block: nn.Module) -> None:
    """Raise ModelError if a forward pass calls a block twice: a loop over images differs from rank to rank."""
    calls = 0

    def begin(*_: Any) -> None:
        nonlocal calls
        calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        # Activation checkpointing calls it again, in backward.
        if calls > 1 and torch._C._current_graph_task_id() == -1:
            raise ModelError(
                f"student.shard: {name} was called twice in one forward pass. Ranks with different numbers of images "
                "would wait for each other forever: this family cannot be sharded"
            )

    model.register_forward_pre_hook(begin)
    block.register_forward_pre_hook(count)


@contextmanager
def plain_class(model: nn.Module) -> Iterator[None]:
    """While open, a sharded model has its own class: FSDP2's would be written into config.json, with torch's code."""
    sharded: Any = model.__class__
    if is_sharded(model):
        model.__class__ = next(kind for kind in sharded.__mro__[1:] if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


def free(model: nn.Module) -> None:
    """Free what a forward pass without a backward has gathered. Does nothing if the model is not sharded."""
    if isinstance(model, FSDPModule):
        model.reshard()


@torch.no_grad()
def whole_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with their shards gathered in main memory, by name; on other ranks than the first, none.

    One at a time is gathered on the device. Names of one tensor stay names of one tensor. Of a model that is not
    sharded, the tensors are returned as they are. All ranks have to call this.
    """
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    gathered: dict[int, torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if id(tensor) not in gathered:
                whole = tensor.full_tensor()
                gathered[id(tensor)] = whole.cpu() if first else torch.empty(0)  # a view would keep the whole
            tensor = gathered[id(tensor)]
        found[name] = tensor.detach()
    return found if first else {}


def shards_like(tensors: Mapping[str, torch.Tensor], model_tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return whole tensors, which all ranks have, divided as the model's tensors of the same names are."""
    return {
        name: distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        if isinstance(like := model_tensors.get(name), DTensor) and like.shape == tensor.shape
        else tensor
        for name, tensor in tensors.items()
    }


def not_finite(parameters: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of parameters that are infinite or NaN, on any rank. All ranks have to call this."""

    def finite(tensor: torch.Tensor) -> bool:
        return bool(torch.isfinite(tensor.to_local() if isinstance(tensor, DTensor) else tensor).all())

    own = [name for name, parameter in parameters.items() if not finite(parameter)]
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return own
    of_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_ranks, own)
    return sorted({name for names in of_ranks for name in names})
