"""transformers.Trainer with the objective of EM-KD: its arguments, logs and checkpoints work as usual.

Tested with transformers 5.23. Private methods (with an underscore) may change in any minor version, so a test compares
the signatures of all overridden methods with the installed transformers (tests/trainer/loop/test_overrides.py).

Overridden methods, and the reasons (those for sharded students are in sharded.py):

    get_train_dataloader   samples shard by shard and rank by rank (data/order.py), each once an epoch
    get_batch_samples      counts answers, pairs and samples of a whole step, over all ranks; stops after a signal
    compute_loss           the objective, divided by those counts
    create_optimizer       learning rates by module
    create_scheduler       refuses a run whose only step has a learning rate of 0
    log                    adds each loss by its name, and what meter.py measures
    evaluate               accuracy on the answers of the evaluation data, over all ranks
    _init_training_state   arguments of this call override those that a checkpoint was written with
    _run_epoch             a resumed run that has done all its steps does not take another one
    _save_checkpoint       writes complete.json last, and deletes older checkpoints only after that (checkpoints.py)
    _save                  student.py alone decides what a student's folder holds; no pickle
    _load_from_checkpoint  transformers' own leaves most weights of a LLaVA at their initial values, without a warning
    _load_best_model       the same, for the best checkpoint, after checking its files
"""

import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import Subset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from emkd.errors import EmkdError, StoppedError, UsageError
from emkd.interrupt import NAMES
from emkd.trainer.data.samples import Collator, EvaluationSamples, StudentSamples
from emkd.trainer.loop.checkpoints import check, complete, rotate, step_of
from emkd.trainer.loop.evaluation import evaluate_answers
from emkd.trainer.loop.loaders import EpochLoader, evaluation_loader, train_loader, with_empty_batches
from emkd.trainer.loop.meter import Meter
from emkd.trainer.loop.output import what_there_is
from emkd.trainer.loop.sharded import ShardedTrainer
from emkd.trainer.loop.skipped import SkippedRows
from emkd.trainer.loop.stopping import Stopping, agreed
from emkd.trainer.objective.counts import Counts
from emkd.trainer.objective.objective import Objective
from emkd.trainer.report import Watch
from emkd.trainer.student.parameters import parameter_groups
from emkd.trainer.student.sharding import free
from emkd.trainer.student.student import Student

NOT_OURS = ("train_samples_per_second", "train_steps_per_second", "total_flos")


def without_rates(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out Trainer's rates and floating-point operations of a whole run.

    The rates count evaluations and checkpoints as training, unlike samples_per_second, and the operations only text.
    """
    return {name: value for name, value in metrics.items() if name not in NOT_OURS}


class DistillationTrainer(ShardedTrainer):
    """Trains a student from a cache.

    train_dataset:       yields StudentSample or Skipped
    shard_sizes, window: decide the order of samples, together with args.seed (see data/order.py)
    learning_rates:      peak learning rate by module (see student/parameters.py)
    max_skipped:         share of the samples that may be skipped because the student cannot use them
    """

    objective: Objective
    student: Student

    def __init__(
        self,
        *,
        student: Student,
        args: TrainingArguments,
        objective: Objective,
        train_dataset: StudentSamples,
        shard_sizes: list[int],
        window: int,
        learning_rates: Mapping[str, float],
        max_skipped: float,
        eval_dataset: EvaluationSamples | None = None,
    ) -> None:
        super().__init__(
            model=student.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=Collator(student.processor.tokenizer.pad_token_id or 0, objective.stand_in),
            processing_class=student.processor,
        )
        self.remove_callback(PrinterCallback)  # prints dictionaries to stdout, which is for results alone
        self.remove_callback(ProgressCallback)
        self.add_callback(Watch(lambda: self.meter.waiting_share))
        self.model_accepts_loss_kwargs = True  # the objective divides losses by the step's counts, not Trainer
        self.student, self.objective, self.learning_rates = student, objective, learning_rates
        self.shard_sizes, self.window = shard_sizes, window
        self.skipped = SkippedRows(sum(shard_sizes), max_skipped)
        self.stopping = Stopping(self.output, self.checkpoint_bytes, lambda: self.meter.step_seconds)
        self._steps_begun = 0
        self._resumable_step = 0  # of the last checkpoint that a run can resume from; 0 is the start
        self.forget_readings()

    def get_train_dataloader(self) -> EpochLoader:
        """Return this rank's loader, not prepared by accelerate, which would split the batches a second time."""
        samples: Any = self.train_dataset
        return train_loader(samples, self.data_collator, self.args, shard_sizes=self.shard_sizes, window=self.window)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of one optimizer step, and the Counts that its losses are divided by."""
        if self.args.world_size == 1 and self.stopping.interrupt.asked:
            self._stop(self.stopping.interrupt.signal)
        self._steps_begun += 1
        self.meter.begin_step()
        with self.meter.waiting:
            micro_batches = list(islice(epoch_iterator, num_batches))
        skipped = [row for batch in micro_batches for row in batch["skipped"]]
        self.meter.samples += sum(len(batch["samples"]) for batch in micro_batches)
        self.meter.skipped += len(skipped)
        for batch in micro_batches:
            self.meter.add_inputs(batch["inputs"])
        counts = Counts.total(self.objective.count(batch["samples"]) for batch in micro_batches)
        self.meter.pairs += counts.pairs
        new = self.skipped.new(skipped)
        own = torch.cat([counts.as_tensor(), torch.tensor([len(new)]), self.stopping.votes()])
        *total, n_new, interrupted, terminated = self._add_up(own.to(device)).tolist()
        if number := agreed([interrupted, terminated]):
            self._stop(number)
        if n_new:
            self.skipped.add(new)
        self.stopping.doing = "step"
        return micro_batches, Counts.from_tensor(total)

    def stop_if_asked(self) -> None:
        """Raise StoppedError if a signal asked any rank to stop after its last step. All ranks have to call this."""
        if number := agreed(self._add_up(self.stopping.votes().to(self.args.device)).tolist()):
            raise StoppedError(f"stopped by {NAMES[number]} at the end: {what_there_is(self.output)}", 128 + number)

    def _stop(self, number: int) -> NoReturn:
        """Save a checkpoint of the last finished step, whatever the recipe saves, and raise StoppedError."""
        step = self.state.global_step
        if step != self._resumable_step:
            self.args.save_only_model = False
            self._save_checkpoint(self.model_wrapped, None)
        # A rank that ended before the first rank has completed the checkpoint would make Ray or torchrun end that, too.
        self.accelerator.wait_for_everyone()
        self.stopping.interrupt.finished = True
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # loggers write what they hold
        raise StoppedError(f"stopped by {NAMES[number]} after step {step}: {what_there_is(self.output)}", 128 + number)

    def weight_bytes(self) -> int:
        """Return the bytes of the student's weights."""
        return sum(p.numel() * p.element_size() for p in self.student.model.parameters())

    def checkpoint_bytes(self) -> int:
        """Return the bytes of weights and optimizer; before the first step, which fills it, those of AdamW."""
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        held = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        filled = sum(tensor.numel() * tensor.element_size() for tensor in held)
        return self.weight_bytes() + (filled or 2 * 4 * self.student.n_trainable)

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks; all ranks have to call this."""
        total: torch.Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the micro-batch's share of the step's total loss, a scalar."""
        counts = num_items_in_batch or self.objective.count(inputs["samples"])
        with self.accelerator.autocast():  # for the LM head, too, which is called outside of the model's forward
            losses = self.objective(model, self.student.model, inputs["inputs"], inputs["samples"], counts)
        named = {name: getattr(losses, name) for name in self.objective.weights.named}
        self.meter.add(named, losses.retained_mass, losses.lacking_mass, losses.answer_lacking_mass)
        # Data parallelism averages gradients over ranks, but the counts are sums over all ranks already.
        return losses.total * self.accelerator.num_processes

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, with learning rates by module if the recipe has any.

        Raises UsageError if the optimizer cannot be created, or takes no learning rates by module.
        """
        try:
            return self._optimizer(model)
        except EmkdError:
            raise
        except (ValueError, ImportError, RuntimeError) as error:
            raise UsageError(f"the optimizer training.optim {self.args.optim!s} cannot be used: {error}") from error

    def _optimizer(self, model: Any) -> torch.optim.Optimizer:
        if not self.learning_rates or self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.student.model)
        if {"params", "model", "optimizer_dict"} & options.keys():
            raise UsageError(
                f"training.optim {self.args.optim!s} takes no learning rates by module: remove student.learning_rates, "
                "or choose another optimizer"
            )
        decay = set(self.get_decay_parameter_names(self.student.model))
        groups = parameter_groups(self.student.model, self.learning_rates, decay, self.args.weight_decay)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create Trainer's scheduler. Raises UsageError if the only step of the run has a learning rate of 0."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if num_training_steps == 1 and not any(scheduler.get_last_lr()):
            raise UsageError(
                "the run has 1 step, and warm-up gives it a learning rate of 0: no weight would change. Set "
                "training.warmup_steps 0, or have more steps by making them smaller (per_device_train_batch_size, "
                "gradient_accumulation_steps)"
            )
        return scheduler

    def try_scheduler(self, n_steps: int) -> None:
        """Make the scheduler once, for an optimizer of nothing. Raises what it raises, and UsageError."""
        nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.args.learning_rate)
        try:
            self.create_scheduler(n_steps, nothing)
        finally:
            self.lr_scheduler, self._created_lr_scheduler = None, False

    @property
    def steps_done(self) -> int:
        """Steps of this call, without those of the checkpoint that it resumed from."""
        return self.state.global_step - self._initial_global_step

    @property
    def has_stepped(self) -> bool:
        """Whether a step of this call is done."""
        return self._steps_begun > 1

    @property
    def output(self) -> Path:
        """The run's output folder."""
        return Path(str(self.args.output_dir))

    def forget_readings(self) -> None:
        """Start the numbers of the next log line anew."""
        self.meter = Meter()
        self.objective.stopwatch = self.meter.assignment

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line; a line about training includes what was measured since the last such line."""
        if "loss" in logs:
            found = self.meter.readings(self._add_up, self.args.device)
            logs = {**logs, **{name: round(value, 6) for name, value in found.items()}}
            self.forget_readings()
        if "train_runtime" in logs:  # rates that count evaluations and checkpoints as training
            logs = without_rates(logs)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return `evaluate_answers` over all ranks, under the names that Trainer users expect (eval_accuracy, ...)."""
        chosen: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        own = Subset(chosen, range(self.args.process_index, len(chosen), self.args.world_size))
        with self.meter.paused(), self.stopping.during("evaluation"):
            loader = evaluation_loader(own, self.data_collator, self.args)
            with self.autocast_smart_context_manager():
                most = -(-len(chosen) // (self.args.world_size * self.args.eval_batch_size))
                batches = with_empty_batches(loader, most) if self.sharded else loader
                result = evaluate_answers(
                    self.student.model, batches, self.objective.n_tokens, self._add_up, in_step=self.sharded
                )
        free(self.student.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _init_training_state(self, max_steps: int, *others: Any) -> tuple[int, int]:
        """Recompute what a checkpoint's state takes from the call that wrote it.

        These are the steps at which to log and save, and the path of the best checkpoint (the folder may have moved).
        """
        position = super()._init_training_state(max_steps, *others)
        self.state.compute_steps(self.args, max_steps)
        if self.state.best_global_step and self.args.load_best_model_at_end:
            self.state.best_model_checkpoint = str(self.output / f"checkpoint-{self.state.best_global_step}")
            check(Path(self.state.best_model_checkpoint))
        return position

    def _run_epoch(self, *loop: Any, **more: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*loop, **more)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.output / f"checkpoint-{self.state.global_step}"
        # Trainer must not delete older checkpoints before this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with self.meter.paused(), self.stopping.during("checkpoint"):
            if self.args.should_save and folder.is_dir():  # left by a run that was killed while it saved
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()  # each rank saves its own random state
            if self.args.should_save:
                self.skipped.save(folder)
                complete(folder)
                best = self.state.best_model_checkpoint
                rotate(self.output, limit, folder, None if best is None else Path(best))
        if not self.args.save_only_model:
            self._resumable_step = self.state.global_step

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir) if output_dir else self.output
        self.student.check_finite(folder)  # on all ranks, so that none waits for another
        self.student.save(folder, resumable=folder != self.output, writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumable_step = step_of(Path(resume_from_checkpoint))
        self.student.restore(Path(resume_from_checkpoint))
        self.skipped.restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            check(Path(self.state.best_model_checkpoint))
            self.student.restore(Path(self.state.best_model_checkpoint))
