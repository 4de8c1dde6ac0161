"""transformers.Trainer with the objective of EM-KD: its arguments, logs and checkpoints work as usual.

What is overridden, and why:
    get_batch_samples      counts answers, pairs and samples of the whole optimizer step, over all ranks
    compute_loss           the objective, divided by those counts
    log                    adds each loss by its name
    _load_from_checkpoint  transformers' own leaves most weights of a LLaVA at their initial values, silently
    _get_train_sampler     shard by shard (order.py)
    evaluate               answers right on the evaluation data
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from emkd.trainer.evaluation import evaluate_answers
from emkd.trainer.objective import Counts, Objective
from emkd.trainer.order import ShardSampler
from emkd.trainer.stream import Collator, EvaluationSamples, StudentSamples
from emkd.vlm.loading import load_model


class LogLines(TrainerCallback):
    """One line on stderr for each log: step, then each number by its name."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and state.is_world_process_zero:
            numbers = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items())
            print(f"step {state.global_step}/{state.max_steps}: {numbers}", file=sys.stderr, flush=True)


class DistillationTrainer(Trainer):
    """Trains a student from a cache. `train_dataset` yields `StudentSample`s."""

    objective: Objective
    sampler: ShardSampler

    def __init__(
        self,
        *,
        model: Any,
        processor: Any,
        args: TrainingArguments,
        objective: Objective,
        train_dataset: StudentSamples,
        sampler: ShardSampler,
        eval_dataset: EvaluationSamples | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=Collator(processor.tokenizer.pad_token_id or 0),
            processing_class=processor,
        )
        self.remove_callback(PrinterCallback)  # prints dictionaries to stdout, which belongs to results
        self.remove_callback(ProgressCallback)
        self.add_callback(LogLines)
        self.model_accepts_loss_kwargs = True  # losses are divided by the step's counts here, not by Trainer
        self.objective, self.sampler = objective, sampler
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._steps_summed = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> ShardSampler:
        return self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and the counts that its losses are divided by."""
        micro_batches = list(islice(epoch_iterator, num_batches))
        counts = Counts.total(self.objective.count(batch["samples"]) for batch in micro_batches)
        total = self.accelerator.reduce(counts.as_tensor().to(device), reduction="sum")
        return micro_batches, Counts.from_tensor(total)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The micro-batch's share of the step's total loss, a scalar."""
        base = self.accelerator.unwrap_model(model)
        counts = num_items_in_batch or self.objective.count(inputs["samples"])
        losses = self.objective(model, base, inputs["inputs"], inputs["samples"], counts)
        for name in self.objective.weights.named:
            self._sums[name] += getattr(losses, name).detach()
        # Data parallelism averages gradients over ranks; the counts are already those of all ranks.
        return losses.total(self.objective.weights) * self.accelerator.num_processes

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._steps_summed += self.accelerator.sync_gradients
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean over the steps since the last log of each loss that has a weight."""
        if "loss" in logs and self._steps_summed:
            for name, value in self._sums.items():
                # Each rank's part is already divided by the counts of all ranks: their sum is the mean.
                whole = float(self.accelerator.reduce(value, reduction="sum"))
                logs = {**logs, name: round(whole / self._steps_summed, 6)}
            self._sums.clear()
            self._steps_summed = 0
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Share of answer tokens right and their mean cross-entropy, under the names that Trainer users expect."""
        chosen: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        loader = DataLoader(chosen, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
        model = self.accelerator.unwrap_model(self.model)
        result = evaluate_answers(model, loader, self.objective.n_tokens)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights of a checkpoint through `from_pretrained`, which knows how keys are named on disk."""
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        target.load_state_dict(checkpoint_weights(Path(resume_from_checkpoint)), strict=True)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a saved model under the names that it has in memory. Raises ModelError on missing ones."""
    loaded: Any = load_model(path, dtype="auto")
    state: dict[str, torch.Tensor] = loaded.state_dict()
    return state
