"""The student's forward pass, for its hidden states alone: no logits but those that its LM head is checked with.

Shape legend: B samples of a micro-batch, T positions, d hidden size
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from emkd.trainer.data.samples import StudentSample
from emkd.vlm.checks import check_causal, check_same_logits
from emkd.vlm.forward import keep_last_hidden_state
from emkd.vlm.head import LMHead


class HiddenStates:
    """Calls a model for its last hidden states, and checks with the first batch that its family is supported.

    n_tokens: ids whose logits are compared in that check
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self._head_checked = self._causal_checked = False

    def __call__(
        self, model: Any, base: Any, inputs: dict[str, torch.Tensor], samples: Sequence[StudentSample]
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """([B, T, d], a 0 that ties the loss to trainable parameters that have no part in them).

        model: what is called (it may be wrapped for data parallelism);  base: the model itself

        Raises ModelError for a model whose logits are not those of a plain LM head on its hidden states, or whose
        attention is not causal (vlm/checks.py).
        """
        if samples and not self._causal_checked:
            check_causal(base, samples[0].encoded)
            self._causal_checked = True
        keep = torch.zeros(0 if self._head_checked else 1, dtype=torch.int64, device=inputs["input_ids"].device)
        with keep_last_hidden_state(base) as kept, _some_gradient(base):
            logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        hidden = kept[0]
        if not self._head_checked:
            self._check_head(base, logits[:, 0].detach(), hidden[:, 0].detach())
        return hidden, 0.0 if hidden.requires_grad else logits[:, :0].float().sum()

    def _check_head(self, base: Any, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Compare the model's own logits [B, rows] with those of its LM head on hidden states [B, d]."""
        expected = logits[:, : self.n_tokens].float()
        if bool(expected.isfinite().all()):  # otherwise the training has diverged, and the head is not at fault
            (found,) = LMHead.of(base, self.n_tokens).blocks(hidden, self.n_tokens)
            check_same_logits(base, expected, found)
            self._head_checked = True


@contextmanager
def _some_gradient(base: Any) -> Iterator[None]:
    """While open, logits that no learning parameter has a part in depend on all of them, with gradients of 0.

    Where the language model is frozen, a micro-batch without images is such a case: backward would refuse it, and
    other ranks would wait for ever for this one's gradients. It is done inside of the model's forward, because data
    parallelism looks there for the parameters that take part.
    """

    def add_nothing(module: Any, _: Any, out: Any) -> None:
        if not out.logits.requires_grad and torch.is_grad_enabled():
            learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
            out.logits = out.logits + sum(parameter.flatten()[:1].sum() for parameter in learning) * 0

    handle = base.register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()
