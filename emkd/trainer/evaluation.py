"""How many answers a model gets right."""

from collections.abc import Iterable
from typing import Any

import torch

from emkd.trainer.losses import supervised
from emkd.trainer.objective import predicting_mask
from emkd.vlm.forward import to_model


@torch.no_grad()
def evaluate_answers(model: Any, batches: Iterable[dict[str, Any]], n_tokens: int) -> dict[str, float]:
    """Teacher-forced: the share of answer tokens that are the most likely ones given everything before them.

    Returns accuracy (0 to 1), loss (mean cross-entropy in nats) and answer_tokens. Ids beyond the tokenizer's are
    no candidates.
    """
    was_training = model.training
    model.eval()
    right, total, loss = 0, 0, 0.0
    for batch in batches:
        inputs = to_model(batch["inputs"], model)
        logits = model(**inputs, use_cache=False, logits_to_keep=predicting_mask(inputs, batch["samples"])).logits
        logits = logits.reshape(-1, logits.shape[-1])[:, :n_tokens].float()
        wanted = [s.encoded.text_ids[s.encoded.answer_positions] for s in batch["samples"]]
        answers = torch.cat(wanted).to(logits.device)
        right += int((logits.argmax(dim=1) == answers).sum())
        loss += float(supervised(logits, answers))
        total += len(answers)
    model.train(was_training)
    return {"accuracy": right / max(1, total), "loss": loss / max(1, total), "answer_tokens": total}
