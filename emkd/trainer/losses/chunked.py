"""Losses of logits without ever holding all logits: the LM head, a loss and its gradient, chunk by chunk.

    hidden states [n, d] --head, and what follows it--> logits of a chunk --loss--> values, gradient
        --> gradients of states and weight

The gradient of a sum of losses is known as soon as the chunk's logits are, so the forward pass already propagates it to
hidden states and weight; backward only scales it. Nothing is computed twice: there is one product with the weight for
the logits and two for the gradients, as if all logits were kept. In memory are the logits of one chunk (with what the
loss needs of them), the gradient of the hidden states [n, d] and the gradient of the weight [rows, d], in float32.

Shape legend: n tokens, d hidden size, V ids, c tokens of a chunk
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from emkd.vlm.head import LMHead

# Logits of a chunk: 64 MiB in float32.
CHUNK = 1 << 24
# Entries of the weight's gradient that are added at a time.
ADDED = 1 << 25

# (float32 logits [c, V], rows of a part that they belong to) -> sum of each loss over these rows, by name.
TokenLosses = Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """n tokens with the same losses.

    hidden:  [n, d], the input of the LM head
    losses:  computes them from logits
    weights: the weight in the total of each loss that `losses` returns
    """

    hidden: torch.Tensor
    losses: TokenLosses
    weights: dict[str, float]


def head_losses(head: LMHead, parts: Sequence[Part]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return (weighted total, sum of each loss by name) over the tokens of all parts, all scalars.

    The total has gradients to hidden states and head; call backward on it at most once. The sums have no gradients.
    Under autocast, products with the weight use its dtype; everything else is float32.

    Raises ValueError if a part's losses and weights have different names, RuntimeError for a second backward.
    """
    hidden = torch.cat([part.hidden for part in parts])
    sums: dict[str, torch.Tensor] = {}
    run = _Run(head=head, dtype=head.dtype, parts=parts, with_gradients=torch.is_grad_enabled(), sums=sums)
    with torch.autocast(hidden.device.type, enabled=False):
        total: torch.Tensor = _HeadLosses.apply(hidden, head.weight, head.bias, run)
    return total, sums


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The arguments of one call; `sums` is its second result."""

    head: LMHead
    dtype: torch.dtype
    parts: Sequence[Part]
    with_gradients: bool
    sums: dict[str, torch.Tensor]

    def chunks(self) -> Iterator[tuple[Part, slice, slice]]:
        """Yield (part, rows within it, rows within all parts together)."""
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
        gradients = _Gradients(ctx.needs_input_grad[:3] if run.with_gradients else (False,) * 3, hidden, weight, bias)
        total = torch.zeros((), device=hidden.device)
        for part in run.parts:
            run.sums.update({name: run.sums.get(name, total.clone()) for name in part.weights})
        for part, rows, rows_of_all in run.chunks():
            states = hidden[rows_of_all].to(run.dtype)
            logits = run.head.after(functional.linear(states, *products).float())
            value, gradient = _value_and_gradient(part, rows, logits, run.sums, gradients.wanted)
            total += value
            if gradient is not None:
                gradient = run.head.after.backward(gradient, logits.detach())
            del logits
            if gradient is not None:
                gradients.add(gradient, rows_of_all, states, products[0])
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.gradients.take(scale), None


def _value_and_gradient(
    part: Part, rows: slice, logits: torch.Tensor, sums: dict[str, torch.Tensor], wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (weighted sum of a chunk's losses, its gradient [c, V] if wanted), and add each loss to `sums`."""
    with torch.enable_grad():
        losses = part.losses(logits.requires_grad_(wanted), rows)
        if losses.keys() != part.weights.keys():
            raise ValueError(f"the part has losses {sorted(losses)} and weights for {sorted(part.weights)}")
        value = torch.stack([part.weights[name] * loss for name, loss in losses.items()]).sum()
        gradient = torch.autograd.grad(value, logits)[0] if wanted else None
    for name, loss in losses.items():
        sums[name] += loss.detach()
    return value.detach(), gradient


class _Gradients:
    """The gradients of hidden states, weight and bias, summed in float32; None for those that need none."""

    def __init__(self, needed: Sequence[bool], *tensors: torch.Tensor | None) -> None:
        self.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if need and tensor is not None else None
            for need, tensor in zip(needed, tensors, strict=True)
        )
        self.wanted = any(needed)
        self._taken = False

    def add(self, gradient: torch.Tensor, rows: slice, states: torch.Tensor, weight: torch.Tensor) -> None:
        """Propagate the gradient of logits [c, V] to the hidden states `rows`, to weight and bias."""
        n_tokens = gradient.shape[1]
        if self.bias is not None:
            self.bias[:n_tokens] += gradient.sum(dim=0)
        scale: torch.Tensor | float = 1.0
        if states.dtype == torch.float16:  # small gradients would underflow: scale the largest to 1
            scale = gradient.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        gradient = (gradient / scale if states.dtype == torch.float16 else gradient).to(states.dtype)
        if self.hidden is not None:
            self.hidden[rows] = (gradient @ weight).float() * scale
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
        """Return all gradients times `scale`, in the tensors' own dtypes; only once, as they are scaled in place."""
        if self._taken:
            raise RuntimeError(
                "backward was called twice on these losses; compute the losses again before the second call"
            )
        self._taken = True
        found = (self.hidden, self.weight, self.bias)
        self.hidden = self.weight = self.bias = None
        return [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(found, self.dtypes, strict=True)
        ]
