"""What a family of models has to keep to, looked at on a first batch: what is computed here and there is right for such
models alone.
"""

from typing import Any

import torch

from emkd.errors import ModelError
from emkd.samples.encode import Encoded
from emkd.vlm.forward import collate, evaluating, last_hidden_state, lm_logits, to_model
from emkd.vlm.loading import VisionLanguageModel


def check_teacher(vlm: VisionLanguageModel, first: Encoded, pad_token_id: int) -> None:
    """On one sample. Raises ModelError as `check_head` and `check_causal`."""
    batch = to_model(collate([first], pad_token_id), vlm.model)
    check_head(vlm.model, batch, vlm.n_tokens)
    check_causal(vlm.model, first)


@torch.no_grad()
def check_head(model: Any, batch: dict[str, torch.Tensor], n_tokens: int) -> None:
    """Raises ModelError unless the LM head on the last hidden state is what the model itself answers.

    A family that does something behind its head (a softcap, a scale) would otherwise be cached wrongly.
    """
    expected = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1, :n_tokens].float()
    check_same_logits(model, expected, lm_logits(model, last_hidden_state(model, batch)[:, -1], n_tokens))


@torch.no_grad()
def check_causal(model: Any, sample: Encoded) -> None:
    """Raises ModelError where the sample's hidden states depend on a text token behind them.

    A model that reads a prompt in both directions (PaliGemma) has seen the answer that it is asked for, and an image's
    tokens are other ones with each question. The sample goes alone: without padding some models are given no mask.
    """
    last = int(sample.text_positions[-1])
    words = sample.text_ids[~sample.in_image]
    others = words[words != sample.text_ids[-1]]
    if not len(others):
        return  # a text of one word says nothing
    batch = to_model(collate([sample], pad_token_id=0), model)
    changed = batch["input_ids"].clone()
    changed[0, last] = others[-1]
    with evaluating(model):
        before, after = (
            last_hidden_state(model, {**batch, "input_ids": ids})[0, :last].float()
            for ids in (batch["input_ids"], changed)
        )
    moved = float(((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).max())
    if bool(before.isfinite().all()) and not moved <= 1e-2:
        raise ModelError(
            f"{type(model).__name__}: hidden states change by {moved:.2g} of their size when a later token changes; "
            "its attention is not causal, so that it has seen the answers that it is to predict: this family is not "
            "supported"
        )


def check_same_logits(model: Any, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Raises ModelError unless the model's own logits are, but for rounding, those that its LM head gives."""
    worst = float((expected - found).abs().max())
    if not worst <= 1e-2 * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: the LM head on the last hidden state differs from the model's own logits by "
            f"{worst:.3g}; this family changes logits behind its head and is not supported"
        )
