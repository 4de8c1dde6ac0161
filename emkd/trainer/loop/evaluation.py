"""Accuracy and loss of a model on the answers of a dataset."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from emkd.errors import DataFormatError
from emkd.trainer.data.samples import StudentSample
from emkd.trainer.losses.divergence import supervised
from emkd.vlm.forward import evaluating, to_model


@torch.no_grad()
def evaluate_answers(
    model: Any,
    batches: Iterable[dict[str, Any]],
    n_tokens: int,
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    *,
    in_step: bool = False,
) -> dict[str, float]:
    """Score a model with teacher forcing: an answer token is right if it is the most likely one after all before it.

    batches:  as `Collator` makes them
    n_tokens: V; larger ids are no candidates
    add_up:   sums a vector over the ranks, each of which has a part of the batches
    in_step:  run the model on batches without samples, too, because other ranks wait for this one

    Returns accuracy (0 to 1), loss (mean cross-entropy in nats), answer_tokens and skipped_rows (unusable rows).
    Raises DataFormatError if no row is usable.
    """
    right, total, loss, skipped = 0, 0, 0.0, 0
    with evaluating(model):
        for batch in batches:
            skipped += len(batch["skipped"])
            if not batch["samples"] and not in_step:
                continue
            inputs = to_model(batch["inputs"], model)
            logits = model(**inputs, use_cache=False, logits_to_keep=predicting_mask(inputs, batch["samples"])).logits
            if not batch["samples"]:
                continue
            logits = logits.reshape(-1, logits.shape[-1])[:, :n_tokens].float()
            wanted = [s.encoded.text_ids[s.encoded.answer_positions] for s in batch["samples"]]
            answers = torch.cat(wanted).to(logits.device)
            right += int((logits.argmax(dim=1) == answers).sum())
            loss += float(supervised(logits, answers))
            total += len(answers)
    counts = add_up(torch.tensor([right, total, skipped], device=model.device))
    right, total, skipped = (int(count) for count in counts)
    if total == 0:
        raise DataFormatError(
            f"nothing to evaluate on: none of the {skipped} rows of the evaluation data is usable; check --eval-data"
        )
    mean = float(add_up(torch.tensor([loss / total], dtype=torch.float32, device=model.device)))
    return {"accuracy": right / total, "loss": mean, "answer_tokens": total, "skipped_rows": skipped}


def predicting_mask(inputs: dict[str, torch.Tensor], samples: Sequence[StudentSample]) -> torch.Tensor:
    """Return [B, T] bool, True at the positions whose logits predict answer tokens: row by row, in order."""
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, sample in enumerate(samples):
        mask[row, sample.encoded.predicting_positions.to(mask.device)] = True
    return mask
