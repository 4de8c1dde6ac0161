"""Losses of logits that never exist whole: the LM head, a loss and its gradient, some tokens at a time.

    hidden states [n, d] --head--> logits of a chunk --loss--> values, gradient --> what hidden states and weight learn

The gradient of a sum of losses is known as soon as the chunk's logits are, so it is carried on to hidden states and
weight at once, in the forward pass; backward only scales it. Nothing is computed twice: one product with the weight
for the logits and two for the gradients, as if all logits were kept, and at any time there are the logits of one
chunk (with what the loss needs of them), the gradient [n, d] and that of the weight [rows, d], float32.

Shape legend: n tokens, d hidden size, V ids, c tokens of a chunk
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from emkd.vlm.head import LMHead

# Logits of a chunk.
CHUNK = 1 << 24
# Numbers of the weight's gradient that a chunk adds at a time.
ADDED = 1 << 25

# Sums of losses by name, from float32 logits [c, V] of the tokens `rows` of a part.
TokenLosses = Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """n tokens with the same losses.

    hidden:  [n, d], what the LM head reads
    weights: of each loss that `losses` gives, in the total
    """

    hidden: torch.Tensor
    losses: TokenLosses
    weights: dict[str, float]


def head_losses(head: LMHead, parts: Sequence[Part]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(weighted total, sum of each loss by name) over the tokens of all parts.

    The total has gradients to hidden states and head, and can go backward once; the sums have none. Products with the
    weight are in autocast's dtype where it is on, all else is float32.
    """
    hidden = torch.cat([part.hidden for part in parts])
    sums: dict[str, torch.Tensor] = {}
    run = _Run(head=head, dtype=head.dtype, parts=parts, learns=torch.is_grad_enabled(), sums=sums)
    with torch.autocast(hidden.device.type, enabled=False):
        total: torch.Tensor = _HeadLosses.apply(hidden, head.weight, head.bias, run)
    return total, sums


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one call is about; `sums` is filled by it."""

    head: LMHead
    dtype: torch.dtype
    parts: Sequence[Part]
    learns: bool
    sums: dict[str, torch.Tensor]

    def chunks(self) -> Iterator[tuple[Part, slice, slice]]:
        """(part, rows within it, rows of all)."""
        size, start = max(1, CHUNK // self.head.n_tokens), 0
        for part in self.parts:
            n = len(part.hidden)
            for first in range(0, n, size):
                last = min(n, first + size)
                yield part, slice(first, last), slice(start + first, start + last)
            start += n


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, run: _Run
    ) -> torch.Tensor:
        used = slice(0, run.head.n_tokens)
        products = weight[used].to(run.dtype), None if bias is None else bias[used].to(run.dtype)
        gradients = _Gradients(ctx.needs_input_grad[:3] if run.learns else (False,) * 3, hidden, weight, bias)
        total = torch.zeros((), device=hidden.device)
        for part in run.parts:
            run.sums.update({name: run.sums.get(name, total.clone()) for name in part.weights})
        for part, rows, place in run.chunks():
            states = hidden[place].to(run.dtype)
            logits = functional.linear(states, *products).float()
            value, gradient = _value_and_gradient(part, rows, logits, run.sums, gradients.wanted)
            total += value
            del logits
            if gradient is not None:
                gradients.add(gradient, place, states, products[0])
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.gradients.take(scale), None


def _value_and_gradient(
    part: Part, rows: slice, logits: torch.Tensor, sums: dict[str, torch.Tensor], wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weighted sum of the losses, its gradient [c, V]) of a chunk; adds each loss to `sums`."""
    with torch.enable_grad():
        losses = part.losses(logits.requires_grad_(wanted), rows)
        if losses.keys() != part.weights.keys():
            raise ValueError(f"losses {sorted(losses)} for weights of {sorted(part.weights)}")
        value = torch.stack([part.weights[name] * loss for name, loss in losses.items()]).sum()
        gradient = torch.autograd.grad(value, logits)[0] if wanted else None
    for name, loss in losses.items():
        sums[name] += loss.detach()
    return value.detach(), gradient


class _Gradients:
    """Those of hidden states, weight and bias, summed up in float32; None for what does not learn."""

    def __init__(self, needed: Sequence[bool], *tensors: torch.Tensor | None) -> None:
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if need and tensor is not None else None
            for need, tensor in zip(needed, tensors, strict=True)
        )
        self.wanted = any(needed)
        self._taken = False

    def add(self, gradient: torch.Tensor, place: slice, states: torch.Tensor, weight: torch.Tensor) -> None:
        """What the logits' gradient [c, V] means for the hidden states at `place`, for weight and bias."""
        n_tokens = gradient.shape[1]
        if self.bias is not None:
            self.bias[:n_tokens] += gradient.sum(dim=0)
        scale: torch.Tensor | float = 1.0
        if states.dtype == torch.float16:  # small gradients are nothing in it: the largest becomes 1
            scale = gradient.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        gradient = (gradient / scale if states.dtype == torch.float16 else gradient).to(states.dtype)
        if self.hidden is not None:
            self.hidden[place] = (gradient @ weight).float() * scale
        if self.weight is None:
            return
        if states.dtype == torch.float32:
            self.weight[:n_tokens].addmm_(gradient.T, states)
            return
        size = max(1, ADDED // states.shape[1])
        for start in range(0, n_tokens, size):
            ids = slice(start, min(n_tokens, start + size))
            self.weight[ids] += (gradient[:, ids].T @ states).float() * scale

    def take(self, scale: torch.Tensor) -> list[torch.Tensor | None]:
        """All of them times `scale`, in the tensors' own dtypes. Once: they are scaled in place."""
        if self._taken:
            raise RuntimeError("these losses went backward before; compute them again to do so twice")
        self._taken = True
        found = (self.hidden, self.weight, self.bias)
        self.hidden = self.weight = self.bias = None
        return [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(found, self.dtypes, strict=True)
        ]
