"""One process of a training run: checks that the student can use the cache, then trains it. No teacher is loaded.

    check the call -> compare tokenizer and data with the cache -> load the student -> DistillationTrainer -> save

A run of one process consists of this alone; under torchrun or Ray Train every rank runs it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, set_seed

from emkd.agreement.agree import Agreement
from emkd.clock import today
from emkd.errors import EmkdError, UsageError
from emkd.interrupt import Interrupt, by_signals
from emkd.samples.dataset import Dataset
from emkd.trainer.data.run_data import RunData, encoder, evaluation_samples, open_run_data
from emkd.trainer.data.samples import Collator, EvaluationSamples
from emkd.trainer.data.stand_in import stand_in
from emkd.trainer.loop.evaluation import evaluate_answers
from emkd.trainer.loop.first_run import agree_with_first_run
from emkd.trainer.loop.output import RECIPE_NAME, check_output
from emkd.trainer.loop.rehearsal import rehearse, until_stepped
from emkd.trainer.loop.sharded import check_arguments
from emkd.trainer.loop.trainer import DistillationTrainer, without_rates
from emkd.trainer.matching.assignment import check_solver
from emkd.trainer.objective.objective import Objective
from emkd.trainer.recipe.arguments import training_arguments
from emkd.trainer.recipe.recipe import LossRecipe
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.report import log, watching
from emkd.trainer.student.card import CardFacts, model_card
from emkd.trainer.student.sharding import is_sharded
from emkd.trainer.student.student import Student, load_student
from emkd.vlm.forward import full_float32
from emkd.vlm.identity import licence
from emkd.vlm.loading import load

# Passes signals to an Interrupt while it is open.
SignalSource = Callable[[Interrupt], AbstractContextManager[None]]


def train_one_process(settings: TrainSettings, signals: SignalSource = by_signals) -> dict[str, float]:
    """Train a student as one rank, save it to `settings.output`, and return the metrics of the run.

    signals: from where requests to stop come; a recipe with training.save_on_signal: false does without them

    Raises UsageError and its subclasses (TokenizerMismatchError, DataMismatchError, OutputExistsError, ...) before
    training starts, CacheError if the cache is damaged or not sealed, DataFormatError if too many rows are skipped,
    TrainingDivergedError if weights or logits are not finite, StoppedError after a signal.
    """
    checkpoint = check_output(settings)
    arguments = training_arguments(settings.output, settings.recipe.training, settings.eval_data is not None)
    if arguments.tf32 is None:  # else the recipe has decided
        full_float32()
    check_solver(settings.recipe.losses.solver, arguments.device)
    if settings.recipe.student.shard:
        check_arguments(arguments)
    log("opening data and cache, and comparing them" if settings.cache else "opening the data")
    run_data = open_run_data(settings)
    log(f"loading the student {settings.student}")
    set_seed(arguments.seed)
    student = load_student(settings, arguments.device)
    agreement = run_data.agree(student.vlm, distils=settings.recipe.losses.weights.needs_cache)
    clock = run_data.clock(student.vlm, settings)
    agree_with_first_run(settings, run_data.cache, run_data.selection, run_data.dataset, arguments.world_size, clock)
    student.card = model_card(_facts(settings, run_data, student))
    trainer = _trainer(settings, run_data, student, arguments, agreement, clock)
    log(_first_line(settings, student, arguments, run_data))
    resumed = None if checkpoint is None else str(checkpoint)
    source = signals(trainer.stopping.interrupt) if settings.recipe.save_on_signal else nullcontext()
    with source, watching():
        with until_stepped(trainer, settings.recipe.training):
            metrics: dict[str, float] = trainer.train(resume_from_checkpoint=resumed).metrics
        _save(settings, trainer)
        trainer.stop_if_asked()
    metrics = {"steps": trainer.steps_done, **without_rates(metrics)}
    if trainer.skipped:
        metrics["skipped_rows"] = len(trainer.skipped)
    if trainer.eval_dataset is not None:
        log(f"evaluating on {settings.eval_data}")
        metrics |= trainer.evaluate()
    return metrics


def _trainer(
    settings: TrainSettings,
    run_data: RunData,
    student: Student,
    arguments: TrainingArguments,
    agreement: Agreement,
    clock: str | None,
) -> DistillationTrainer:
    """Make the trainer. Raises UsageError if a package, optimizer or logger of the recipe is not available."""
    recipe = settings.recipe
    given: dict[str, Any] = dict(
        student=student,
        args=arguments,
        objective=_objective(recipe.losses, run_data, student, arguments, clock),
        train_dataset=run_data.samples(student.vlm, recipe.losses.top_k, agreement, clock),
        shard_sizes=run_data.shard_sizes,
        window=recipe.window,
        learning_rates=recipe.student.learning_rates,
        max_skipped=recipe.max_skipped,
        eval_dataset=evaluation_samples(settings, student.vlm, clock),
    )
    try:
        trainer = DistillationTrainer(**given)
    except EmkdError:
        raise
    except (
        ValueError,
        ImportError,
        RuntimeError,
    ) as error:  # for example, report_to names a package that is not installed
        raise UsageError(f"the recipe's training section: {error}") from error
    trainer.create_optimizer()
    log("trying a first sample, and what will be saved")
    rehearse(trainer, recipe.training)
    return trainer


def _objective(
    losses: LossRecipe, run_data: RunData, student: Student, arguments: TrainingArguments, clock: str | None
) -> Objective:
    codes = run_data.codes(arguments.device) if losses.weights.needs_cache else None
    return Objective(
        losses.weights,
        run_data.n_tokens(student.vlm),
        losses.distance(has_codes=codes is not None),
        losses.matching,
        arguments.seed,
        losses.solver,
        losses.compared,
        codes,
        stand_in(encoder(student.vlm, clock)) if is_sharded(student.model) else None,
        losses.vision_share,
    )


def _facts(settings: TrainSettings, run_data: RunData, student: Student) -> CardFacts:
    """Return the facts of the model card. If no loss needs the cache, the card does not mention it."""
    cache = run_data.cache if settings.recipe.losses.weights.needs_cache else None
    return CardFacts(
        student=f"./{Path(settings.student).name}" if Path(settings.student).is_dir() else settings.student,
        data=Path(settings.data).name,
        revision=settings.revision,
        licence=licence(student.vlm.path),
        model_type=student.model.config.model_type,
        vision_pool=getattr(student.model.config, "vision_pool", 1),
        n_parameters=student.n_saved,
        n_trainable=student.n_trainable,
        n_samples=run_data.n_samples,
        recipe=settings.recipe,
        cache=settings.cache if cache is not None else None,
        manifest=None if cache is None else cache.manifest,
        sealed=cache is None or cache.sealed,
    )


def _first_line(settings: TrainSettings, student: Student, arguments: TrainingArguments, run_data: RunData) -> str:
    """Return the log line that says what is trained, on which data, and with which settings."""
    losses = settings.recipe.losses
    weights = f"alpha {losses.alpha:g}, beta {losses.beta:g}, gamma {losses.gamma:g}"
    distils = losses.weights.needs_cache
    reading = _reading(losses, run_data) if distils else ""
    if distils and losses.temperature != 1:
        reading += f", temperature {losses.temperature:g}"
    pool = getattr(student.model.config, "vision_pool", 1)
    averaged = f", {pool} x {pool} vision tokens averaged" if pool > 1 else ""
    computed = f"{student.model.dtype}{', computed in bfloat16' if arguments.bf16 else ''}"
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    rates = "".join(f", {rate:g} below {name}" for name, rate in settings.recipe.student.learning_rates.items())
    teacher = f"teacher from {settings.cache}" if distils else "no teacher"
    return (
        f"training {settings.student} ({student.model.config.model_type}, {student.n_trainable:,} of "
        f"{student.n_parameters:,} parameters trainable, {computed}{averaged}) on {run_data.n_samples} samples of "
        f"{settings.data}, {teacher}; {weights}{reading}; learning rate {arguments.learning_rate:g}{rates}; "
        f"{length} of "
        f"{arguments.per_device_train_batch_size} samples x {arguments.gradient_accumulation_steps} micro-batches x "
        f"{arguments.world_size} workers on {arguments.device}{', sharded' if is_sharded(student.model) else ''}"
    )


def _reading(losses: LossRecipe, run_data: RunData) -> str:
    """Say how the teacher's cut logits are used."""
    has_codes = run_data.cache is not None and run_data.cache.manifest.codes is not None
    matching = f"matching {losses.matching}"
    if losses.matching == "logits":
        matching += f" by {losses.cost}" + ("" if losses.cost_top_k is None else f", the {losses.cost_top_k} largest")
    return f", {losses.divergence}, tail {losses.distance(has_codes=has_codes).tail}, {matching}"


def _save(settings: TrainSettings, trainer: DistillationTrainer) -> None:
    """Save weights, processor, model card and recipe to the output folder."""
    trainer.save_model(str(settings.output))
    if trainer.is_world_process_zero():
        recipe = yaml.safe_dump(settings.recipe.model_dump(mode="json"), sort_keys=False)
        (settings.output / RECIPE_NAME).write_text(recipe)
        log(f"saved to {settings.output}")


def evaluate_checkpoint(path: str, data: str, image_root: Path | None = None, batch_size: int = 32) -> dict[str, float]:
    """Return `evaluate_answers` of a saved model (folder or name on the hub) on a dataset, asked today.

    data: as for --data;  image_root: folder of its image paths;  batch_size: samples of a forward pass
    """
    vlm = load(path)
    dataset = Dataset(data, image_root)
    samples = EvaluationSamples(dataset, encoder(vlm, today()))
    loader = torch.utils.data.DataLoader(
        samples, batch_size=batch_size, collate_fn=Collator(vlm.processor.tokenizer.pad_token_id or 0)
    )
    return evaluate_answers(vlm.model, loader, vlm.n_tokens)
