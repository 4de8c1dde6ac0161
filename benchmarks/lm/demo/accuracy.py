"""Accuracy of a saved model: as `evaluate_checkpoint`, on a GPU if there is one, where a CPU would take minutes."""

from pathlib import Path

import torch

from emkd.samples.dataset import Dataset
from emkd.trainer import evaluate_checkpoint
from emkd.trainer.data.run_data import encoder
from emkd.trainer.data.samples import Collator, EvaluationSamples
from emkd.trainer.loop.evaluation import evaluate_answers
from emkd.vlm import load


def accuracy(model: Path, data: Path) -> float:
    """Return the share of right answers of a checkpoint on a file of scenes."""
    if torch.cuda.is_available():
        return accuracy_on("cuda", model, data)
    return evaluate_checkpoint(str(model), str(data))["accuracy"]


def accuracy_on(device: str, model: Path, data: Path) -> float:
    """Return what `accuracy` does, computed on a device."""
    vlm = load(str(model), device=device)
    samples = EvaluationSamples(Dataset(str(data)), encoder(vlm, None))
    collator = Collator(vlm.processor.tokenizer.pad_token_id or 0)
    loader = torch.utils.data.DataLoader(samples, batch_size=32, collate_fn=collator)
    return evaluate_answers(vlm.model, loader, vlm.n_tokens)["accuracy"]
