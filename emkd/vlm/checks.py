"""The conditions that a family must meet for emkd's results to be correct, checked on the first batch."""

from collections.abc import Sequence
from typing import Any

import torch

from emkd.errors import ModelError
from emkd.samples.encode import Encoded
from emkd.vlm.after_head import AfterHead, after_head, candidates, keep
from emkd.vlm.forward import (
    base_model,
    collate,
    evaluating,
    image_tokens_explained,
    keep_last_hidden_state,
    last_hidden_state,
    lm_logits,
    to_model,
)
from emkd.vlm.loading import VisionLanguageModel

# The logits of a trial reach this multiple of a softcap, where it lets nothing more through.
BEYOND = 4.0
# Largest difference of logits from the model's own, relative to the largest of these (at least 1).
TOLERANCE = 1e-2


def check_teacher(vlm: VisionLanguageModel, first: Encoded, pad_token_id: int) -> None:
    """Run `check_head` and `check_causal` on one sample. Raises ModelError."""
    batch = to_model(collate([first], pad_token_id), vlm.model)
    check_head(vlm.model, batch, vlm.n_tokens)
    check_causal(vlm.model, first)


@torch.no_grad()
def check_head(model: Any, batch: dict[str, torch.Tensor], n_tokens: int) -> None:
    """Check that the LM head on the last hidden state, and what follows it, give the model's own logits.

    A scale or a softcap behind the head is found out first, and kept (see `after_head`). Raises ModelError if the model
    does something else to its logits, which would be cached wrongly.
    """
    with image_tokens_explained(model):
        find_after_head(model, batch, n_tokens)
        expected = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1, :n_tokens].float()
    check_same_logits(model, expected, lm_logits(model, last_hidden_state(model, batch)[:, -1], n_tokens))


@torch.no_grad()
def find_after_head(model: Any, batch: dict[str, torch.Tensor], n_tokens: int) -> None:
    """Find out by trial which of the candidates the model does after its head, and keep it for `after_head`.

    The base model runs once, on the batch. Its head then gets the last hidden state of the first sample, and multiples
    of it with logits beyond each cap: on logits that are small against a cap, there is hardly a difference to see. Of
    equally close candidates, the first is taken. Raises ModelError if none gives the model's own logits.
    """
    tried = candidates(model.config)
    if len(tried) == 1:
        return
    given: list[torch.Tensor] = []

    def give_others(_module: Any, _inputs: Any, out: Any) -> Any:
        given.append(_multiples(model, out.last_hidden_state[:1, -1:], tried, n_tokens))
        out.last_hidden_state = given[0]
        return out

    handle = base_model(model).register_forward_hook(give_others)
    try:
        with evaluating(model):
            own = model(**batch, use_cache=False, logits_to_keep=0).logits[0, :, :n_tokens].float()
    finally:
        handle.remove()
    logits = model.get_output_embeddings()(given[0])[0, :, :n_tokens]
    finite = own.isfinite().all(dim=1)  # not if a training diverged, or float16 cannot hold a multiple
    found = [each(logits).float()[finite] for each in tried]
    errors = [_worst(own[finite], each) for each in found]
    best = errors.index(min(errors)) if bool(finite.any()) else 0
    keep(model, tried[best])
    for row, theirs in zip(found[best], own[finite], strict=True):
        check_same_logits(model, theirs, row)


def _multiples(model: Any, last: torch.Tensor, tried: Sequence[AfterHead], n_tokens: int) -> torch.Tensor:
    """[1, F, d] multiples of a hidden state [1, 1, d], the first of them itself."""
    largest = float(model.get_output_embeddings()(last)[..., :n_tokens].abs().max())
    most = torch.finfo(last.dtype).max / BEYOND / max(largest, float(last.abs().max()))
    wanted = dict.fromkeys(BEYOND * each.cap / each.scale for each in tried if each.cap is not None)
    factors = [1.0, *(min(size / largest, most) for size in wanted if largest > 0)]
    return torch.cat([factor * last for factor in factors], dim=1)


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
            _hidden_state(model, {**batch, "input_ids": ids})[0, :last].float() for ids in (batch["input_ids"], changed)
        )
    moved = float(((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).max())
    if bool(before.isfinite().all()) and not moved <= 1e-2:
        raise ModelError(
            f"{type(model).__name__}: hidden states change by {moved:.2g} of their size when a later token changes; "
            "its attention is not causal, so it has seen the answers that it is to predict. emkd does not support this "
            "family"
        )


def _hidden_state(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Call the model as a whole for its last hidden state [B, T, d]: a sharded one gathers its weights only then."""
    none = torch.zeros(0, dtype=torch.int64, device=batch["input_ids"].device)
    with keep_last_hidden_state(model) as kept, image_tokens_explained(model):
        model(**batch, use_cache=False, logits_to_keep=none)
    return kept[0]


def check_same_logits(model: Any, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Check that logits from the LM head are the model's own, of any shape, up to rounding. Raises ModelError."""
    worst = _worst(expected, found)
    if not worst <= TOLERANCE * max(1.0, float(expected.abs().max())):
        others = ", ".join(map(str, candidates(model.config)))
        raise ModelError(
            f"{type(model).__name__}: the LM head on the last hidden state differs from the model's own logits by "
            f"{worst:.3g}, with {after_head(model)} after it; this family changes logits after its head in a way that "
            f"emkd does not support (tried, from its config: {others})"
        )


def _worst(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max()) if expected.numel() else 0.0
