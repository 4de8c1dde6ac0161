"""Batches, hidden states and logits at chosen positions, computed the same way for teacher and student.

Shape legend: B samples of a batch, T padded length, d hidden size, n chosen positions, V ids of the tokenizer
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from emkd.errors import ModelError
from emkd.samples.encode import Encoded
from emkd.vlm.after_head import after_head

# What transformers says of a processor that counts an image's tokens in another way than the model.
_MISMATCH = re.compile(r"tokens do not match, tokens: (\d+)")


def collate(encoded: Sequence[Encoded], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return one batch of model inputs: token tensors [B, T] padded on the right, image tensors concatenated.

    With padding on the right, every token of a causal model has the result that it has without a batch, and positions
    of `Encoded` stay valid. Raises ModelError if the processor gives a tensor to some samples only, or with a different
    number of axes.
    """
    longest = max(item.n_tokens for item in encoded)
    names = {name: None for item in encoded for name in item.inputs}  # in order; text-only samples have fewer
    batch: dict[str, torch.Tensor] = {}
    for name in names:
        items = [(item, item.inputs[name]) for item in encoded if name in item.inputs]
        if all(tensor.shape == (1, item.n_tokens) for item, tensor in items):
            if len(items) < len(encoded):  # rows would move to their neighbours' positions
                raise ModelError(
                    f"the processor returns {name!r} for only {len(items)} of the {len(encoded)} samples of a batch"
                )
            fill = pad_token_id if name == "input_ids" else 0
            batch[name] = torch.cat([_pad_right(tensor, longest, fill) for _, tensor in items])
        else:
            batch[name] = _stack_images(name, [tensor for _, tensor in items])
    return batch


def _pad_right(tensor: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fill)


def _stack_images(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of several samples along the first axis; shorter tile axes are padded with zeros."""
    ranks = {tensor.dim() for tensor in tensors}
    if len(ranks) != 1:
        raise ModelError(f"the processor's {name!r} has {sorted(ranks)} axes in samples of one batch")
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [wide - size for wide, size in zip(widest, tensor.shape[1:], strict=True)]
        pads = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(tensor, pads) if any(missing) else tensor)
    return torch.cat(padded)


def to_model(batch: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Move a batch to the model's device, and its pixels, which processors give in float32, to the model's dtype."""
    return {
        name: tensor.to(model.device, dtype=model.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
    }


def last_hidden_state(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the hidden state [B, T, d] after the final norm, as the LM head reads it; computes no logits."""
    base = base_model(model)
    with image_tokens_explained(model):
        hidden: torch.Tensor = base(**batch, use_cache=False).last_hidden_state
    return hidden


@contextmanager
def image_tokens_explained(model: Any) -> Iterator[None]:
    """While open, raise ModelError with the settings to compare where transformers raises that a processor writes more
    or fewer placeholders for an image than the vision tower has tokens."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        counts = _MISMATCH.search(str(error))
        if counts is None:
            raise
        config = model.config
        tower = getattr(config, "vision_config", None)
        theirs = {
            "vision_config.patch_size": getattr(tower, "patch_size", None),
            "vision_config.image_size": getattr(tower, "image_size", None),
            "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        }
        named = ", ".join(f"{name} {value!r}" for name, value in theirs.items() if value is not None)
        raise ModelError(
            f"{type(model).__name__}: its processor writes {counts[1]} placeholders for the images of a batch, which "
            "is not the number of their vision tokens. Settings of its processor_config.json (patch_size, "
            "vision_feature_select_strategy, num_additional_image_tokens, the image processor's size) do not fit those "
            f"of its config.json ({named}): make the two agree"
        ) from error


def base_model(model: Any) -> Any:
    """Return the model without its LM head. Raises ModelError if the class has no such part."""
    base = getattr(model, "model", None)
    if base is None or base is model:
        raise ModelError(f"{type(model).__name__} has no base model below its LM head: family not supported")
    return base


@contextmanager
def keep_last_hidden_state(model: Any) -> Iterator[list[torch.Tensor]]:
    """While open, each call of `model` appends its last hidden state [B, T, d] to the list.

    A wrapped model (DistributedDataParallel) must be called as a whole, or its gradients are not averaged; this gives
    its hidden states without a second forward pass.
    """
    kept: list[torch.Tensor] = []
    handle = base_model(model).register_forward_hook(lambda _m, _i, out: kept.append(out.last_hidden_state))
    try:
        yield kept
    finally:
        handle.remove()


def lm_logits(model: Any, hidden: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Return float32 logits [n, V] of hidden states [n, d], without the padding rows of the LM head."""
    return head_logits(model, hidden, n_tokens).float()


def head_logits(model: Any, hidden: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Return the logits [n, V] of `lm_logits` in the dtype of the LM head. Raises ModelError as `after_head`."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return after_head(model)(logits[:, :n_tokens])


def full_float32() -> None:
    """Compute products of float32 matrices in float32, in this process.

    Environments change it: with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which images of GPU clouds set, they have 10 bits.
    """
    torch.set_float32_matmul_precision("highest")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """While open, no module is in training mode (dropout, checkpointing); afterwards each mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
