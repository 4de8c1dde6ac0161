"""The LM head by itself: logits of chosen ids from hidden states, without the logits of all the others.

Shape legend: n tokens, d hidden size, V ids that are used, u of them that are asked for
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from emkd.errors import ModelError

# Numbers of the weight that are copied at a time: on a CPU so few that they stay in its cache.
GATHERED = {"cpu": 1 << 20, "other": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """A linear LM head, of which the first `n_tokens` rows are ids and the others padding.

    weight: [rows, d];  bias: [rows] or None
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    n_tokens: int

    @classmethod
    def of(cls, model: Any, n_tokens: int) -> "LMHead":
        """The head of a model. Raises ModelError for one that is not a linear layer."""
        head = model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise ModelError(
                f"the LM head of {type(model).__name__} is a {type(head).__name__}, not a linear layer: its logits "
                "cannot be computed for some ids alone, and it is not supported"
            )
        return cls(weight=head.weight, bias=head.bias, n_tokens=n_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix product: autocast's where it is on, else the weight's."""
        device = self.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype

    @torch.no_grad()
    def columns(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[u, n] float32: logits of the ids [u] for hidden states [n, d], an id a row. No gradients."""
        out = torch.empty(len(ids), len(hidden), device=hidden.device)
        place = "cpu" if hidden.device.type == "cpu" else "other"
        size = max(1, GATHERED[place] // self.weight.shape[1])
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            bias = None if self.bias is None else self.bias[some]
            out[start : start + size] = self._product(hidden, self.weight[some], bias).T
        return out

    @torch.no_grad()
    def blocks(self, hidden: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """float32 logits [n, <= size] of all V ids for hidden states [n, d], one block of ids after the other."""
        for start in range(0, self.n_tokens, size):
            ids = slice(start, min(self.n_tokens, start + size))
            yield self._product(hidden, self.weight[ids], None if self.bias is None else self.bias[ids]).float()

    def _product(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = self.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
