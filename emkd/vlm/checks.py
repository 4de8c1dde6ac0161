"""The conditions that a family must meet for emkd's results to be correct, checked on the first batch."""

from typing import Any

import torch

from emkd.errors import ModelError
from emkd.samples.encode import Encoded
from emkd.vlm.forward import collate, evaluating, image_tokens_explained, last_hidden_state, lm_logits, to_model
from emkd.vlm.loading import VisionLanguageModel


def check_teacher(vlm: VisionLanguageModel, first: Encoded, pad_token_id: int) -> None:
    """Run `check_head` and `check_causal` on one sample. Raises ModelError."""
    batch = to_model(collate([first], pad_token_id), vlm.model)
    check_head(vlm.model, batch, vlm.n_tokens)
    check_causal(vlm.model, first)


@torch.no_grad()
def check_head(model: Any, batch: dict[str, torch.Tensor], n_tokens: int) -> None:
    """Check that the LM head on the last hidden state gives the model's own logits. Raises ModelError.

    Otherwise the logits of a family that changes them after its head (a softcap, a scale) would be cached wrongly.
    """
    with image_tokens_explained(model):
        expected = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1, :n_tokens].float()
    check_same_logits(model, expected, lm_logits(model, last_hidden_state(model, batch)[:, -1], n_tokens))


@torch.no_grad()
def check_causal(model: Any, sample: Encoded) -> None:
    """Check that the sample's hidden states do not depend on later text tokens. Raises ModelError.

    A model that reads a prompt in both directions (PaliGemma) has seen the answer that it is to predict, and its vision
    tokens change with the question. The sample runs alone: without padding, some models get no attention mask.
    """
    last = int(sample.text_positions[-1])
    words = sample.text_ids[~sample.in_image]
    others = words[words != sample.text_ids[-1]]
    if not len(others):
        return  # a text of a single repeated token shows nothing
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
            "its attention is not causal, so it has seen the answers that it is to predict. emkd does not support this "
            "family"
        )


def check_same_logits(model: Any, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Check that logits [n, V] of the LM head are the model's own, up to rounding. Raises ModelError."""
    worst = float((expected - found).abs().max())
    if not worst <= 1e-2 * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: the LM head on the last hidden state differs from the model's own logits by "
            f"{worst:.3g}; this family changes logits after its head, which emkd does not support"
        )
