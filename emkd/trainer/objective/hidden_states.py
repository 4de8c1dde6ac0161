"""The student's forward pass, which computes hidden states and no logits, except to check the LM head once.

Shape legend: B samples of a micro-batch, T positions, d hidden size
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from emkd.samples.encode import Encoded
from emkd.trainer.data.samples import StudentSample
from emkd.vlm.checks import check_causal, check_same_logits, find_after_head
from emkd.vlm.forward import image_tokens_explained, keep_last_hidden_state
from emkd.vlm.head import LMHead


class HiddenStates:
    """Calls a model for its last hidden states, and checks with the first batch that its family is supported.

    n_tokens: ids whose logits are compared in that check
    stand_in: of a sharded student: what all ranks check its attention with, equally often; None takes a first sample
    """

    def __init__(self, n_tokens: int, stand_in: Encoded | None = None) -> None:
        self.n_tokens, self.stand_in = n_tokens, stand_in
        self._head_checked = self._causal_checked = False

    def __call__(
        self, model: Any, base: Any, inputs: dict[str, torch.Tensor], samples: Sequence[StudentSample]
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return (hidden states [B, T, d], a scalar 0 to add to the loss).

        The 0 ties the loss to the trainable parameters even if the hidden states depend on none of them.

        model: the model to call, which may be wrapped for data parallelism;  base: the model itself

        Raises ModelError for a model whose logits are not what a linear LM head makes of its hidden states, with
        nothing, a scale or a softcap after it, or whose attention is not causal (vlm/checks.py).
        """
        first = self.stand_in or (samples[0].encoded if samples else None)
        if first is not None and not self._causal_checked:
            check_causal(base, first)
            self._causal_checked = True
        keep = torch.zeros(0 if self._head_checked else 1, dtype=torch.int64, device=inputs["input_ids"].device)
        with (
            keep_last_hidden_state(base) as kept,
            _returned(base, kept) if self.stand_in is not None else nullcontext(),
            _some_gradient(base),
            image_tokens_explained(base),
        ):
            logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        hidden = kept[0]
        if not self._head_checked:
            find_after_head(base, inputs, self.n_tokens)
            self._check_head(base, logits[:, 0].detach(), hidden[:, 0].detach())
        return hidden, 0.0 if hidden.requires_grad else logits[:, :0].float().sum()

    def _check_head(self, base: Any, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Compare the model's own logits [B, rows] with those of its LM head on hidden states [B, d]."""
        expected = logits[:, : self.n_tokens].float()
        finite = bool(expected.isfinite().all())  # otherwise the training has diverged, and the head is not at fault
        if finite:
            (found,) = LMHead.of(base, self.n_tokens).blocks(hidden, self.n_tokens)
            check_same_logits(base, expected, found)
        # Ranks of a sharded student have to call it equally often, whatever their own samples give.
        self._head_checked = finite or self.stand_in is not None


@contextmanager
def _returned(base: Any, kept: list[torch.Tensor]) -> Iterator[None]:
    """While open, the output of a sharded model includes its last hidden state.

    FSDP2 prepares and ends the backward pass of a model by hooks on its outputs, and the losses depend on this one. It
    finds it there if this hook comes before its own.
    """

    def add_hidden(_module: Any, _inputs: Any, out: Any) -> Any:
        out.hidden_states = (kept[0],)
        return out

    handle = base.register_forward_hook(add_hidden, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _some_gradient(base: Any) -> Iterator[None]:
    """While open, make logits that depend on no trainable parameter depend on all of them, with gradients of 0.

    This happens if the language model is frozen and a micro-batch has no images: backward would raise an error, and
    the other ranks would wait forever for this rank's gradients. A forward hook does it, because data parallelism
    looks for the parameters that take part inside of the model's forward.
    """

    def add_nothing(module: Any, _: Any, out: Any) -> None:
        if not out.logits.requires_grad and torch.is_grad_enabled():
            trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
            out.logits = out.logits + sum(parameter.flatten()[:1].sum() for parameter in trainable) * 0

    handle = base.register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()
