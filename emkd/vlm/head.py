"""The LM head alone, with what follows it: logits of chosen ids from hidden states, without computing those of all ids.

Shape legend: n tokens, d hidden size, V ids, u chosen ids
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from emkd.errors import ModelError
from emkd.vlm.after_head import NOTHING, AfterHead, after_head

# Elements of the weight that are copied at a time; on a CPU they should fit into its cache.
GATHERED = {"cpu": 1 << 20, "other": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """A linear LM head. Its first `n_tokens` rows are ids, the rest is padding.

    weight: [rows, d];  bias: [rows] or None;  after: what turns its output into the model's logits
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    n_tokens: int
    after: AfterHead = NOTHING

    @classmethod
    def of(cls, model: Any, n_tokens: int) -> "LMHead":
        """Return the head of a model. Raises ModelError if it is not a linear layer, and as `after_head`."""
        head = model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise ModelError(
                f"the LM head of {type(model).__name__} is a {type(head).__name__}, not a linear layer: emkd "
                "cannot compute logits of chosen ids alone, and does not support it"
            )
        return cls(weight=head.weight, bias=head.bias, n_tokens=n_tokens, after=after_head(model))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix product: autocast's if it is on, else the weight's."""
        device = self.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype

    @torch.no_grad()
    def columns(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [u, n] of the ids [u] for hidden states [n, d], one row for each id. No gradients."""
        out = torch.empty(len(ids), len(hidden), device=hidden.device)
        kind = "cpu" if hidden.device.type == "cpu" else "other"
        size = max(1, GATHERED[kind] // self.weight.shape[1])
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            bias = None if self.bias is None else self.bias[some]
            out[start : start + size] = self._product(hidden, self.weight[some], bias).T
        return self.after(out)

    @torch.no_grad()
    def blocks(self, hidden: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """Yield float32 logits [n, <= size] of all V ids for hidden states [n, d], block by block of ids."""
        for start in range(0, self.n_tokens, size):
            ids = slice(start, min(self.n_tokens, start + size))
            bias = None if self.bias is None else self.bias[ids]
            yield self.after(self._product(hidden, self.weight[ids], bias).float())

    @torch.no_grad()
    def logsumexp(self, hidden: torch.Tensor, size: int) -> torch.Tensor:
        """Return the float32 logsumexp [n] of all V logits of hidden states [n, d], `size` ids at a time."""
        found = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        for block in self.blocks(hidden, size):
            found = torch.logaddexp(found, block.logsumexp(dim=1))
        return found

    def _product(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = self.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
