"""`emkd train-student`: checks that the student can use the cache, then trains it. No teacher anywhere.

check the call -> tokenizers and data against the cache -> load the student -> DistillationTrainer -> save

With --workers N Ray Train runs the same thing on N processes (launch.py); torchrun does, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, set_seed

from emkd.errors import UsageError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer.card import CardFacts, model_card
from emkd.trainer.checks import (
    agree_about_pictures_and_text,
    agree_with_first_run,
    check_output,
    open_cache,
)
from emkd.trainer.distillation import DistillationTrainer
from emkd.trainer.evaluation import evaluate_answers
from emkd.trainer.objective import Objective
from emkd.trainer.recipe import Recipe
from emkd.trainer.report import log
from emkd.trainer.selection import Selection, select
from emkd.trainer.settings import TrainSettings
from emkd.trainer.stream import Collator, EvaluationSamples, StudentSamples, TeacherLimits
from emkd.trainer.student import Student, load_student
from emkd.vlm.identity import check_shared_tokenizer, licence, tokenizer_json
from emkd.vlm.loading import VisionLanguageModel, load, resolve

# Without a cache there are no shards; rows are walked as if they came from one with this many a shard.
ROWS_PER_SHARD = 256

# Where TrainingArguments would do something that this kind of run does not want.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-5,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss that is no number is shown as such
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Said where there is nothing else: or bf16 is refused, and several processes train side by side, not together.
    "use_cpu": not torch.accelerator.is_available(),
    # Towers have layers that a LLaVA reads nothing from, and a step may have no image on one rank.
    "ddp_find_unused_parameters": True,
}


def train_student(settings: TrainSettings) -> dict[str, float]:
    """Trains and saves a student to `settings.output`; returns the metrics of the run.

    Raises UsageError and its kin (TokenizerMismatchError, DataMismatchError, OutputExistsError, ...) before
    anything is trained, CacheError where the cache is damaged or not sealed.
    """
    if settings.workers > 1:
        from emkd.trainer.launch import train_on_workers  # Ray is needed for this alone

        return train_on_workers(settings)
    recipe = settings.recipe
    checkpoint = check_output(settings)
    cache = open_cache(settings)
    dataset = Dataset(settings.data, settings.image_root)
    if cache is not None:
        check_shared_tokenizer(cache.tokenizer_json, tokenizer_json(resolve(settings.student, settings.revision)))
    selection = None if cache is None else select(cache, dataset, log)
    rows = range(dataset.n_rows) if selection is None else selection.rows.tolist()
    arguments = training_arguments(settings.output, recipe, settings.eval_data is not None)
    set_seed(arguments.seed)
    student = load_student(settings)
    n_tokens = student.vlm.n_tokens if cache is None else min(student.vlm.n_tokens, cache.manifest.vocabulary_size)
    agree_about_pictures_and_text(cache, student.vlm)
    student.card = model_card(_facts(settings, cache, student, len(rows)))
    agree_with_first_run(settings, cache, selection, dataset, arguments.world_size)
    trainer = DistillationTrainer(
        student=student,
        args=arguments,
        objective=Objective(
            recipe.losses.weights, n_tokens, recipe.losses.tail, recipe.losses.matching, arguments.seed
        ),
        train_dataset=_samples(dataset, rows, student.vlm, cache, selection, recipe, n_tokens),
        shard_sizes=_shard_sizes(cache, selection, len(rows)),
        window=recipe.window,
        learning_rates=recipe.student.learning_rates,
        max_skipped=recipe.max_skipped,
        eval_dataset=_eval_samples(settings, student.vlm),
    )
    log(_first_line(settings, student, trainer, len(rows)))
    metrics: dict[str, float] = trainer.train(
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
    ).metrics
    _save(settings, trainer)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    return metrics


def training_arguments(output: Path, recipe: Recipe, evaluates: bool = False) -> TrainingArguments:
    """TrainingArguments of a recipe over our defaults. Raises UsageError."""
    given = {**DEFAULTS, **recipe.training}
    if not evaluates and (given.get("eval_strategy", "no") != "no" or given.get("load_best_model_at_end")):
        raise UsageError(
            "training.eval_strategy and load_best_model_at_end need data to evaluate on: name them with --eval-data"
        )
    try:
        arguments = TrainingArguments(
            output_dir=str(output), remove_unused_columns=False, average_tokens_across_devices=False, **given
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"the recipe's training section: {error}") from error
    if arguments.n_gpu > 1:  # Trainer would split batches over them by threads, and records cannot be split so
        log(
            f"{arguments.n_gpu} GPUs are visible; one process trains on one of them, --workers {arguments.n_gpu} on all"
        )
        arguments._n_gpu = 1
    return arguments


def _samples(
    dataset: Dataset,
    rows: Sequence[int],
    student: VisionLanguageModel,
    cache: Cache | None,
    selection: Selection | None,
    recipe: Recipe,
    n_tokens: int,
) -> StudentSamples:
    limits = None
    if cache is not None:
        limits = TeacherLimits(
            vocabulary=cache.manifest.vocabulary_size, n_student_tokens=n_tokens, top_k=recipe.losses.top_k
        )
    numbers = None if selection is None else selection.numbers.tolist()
    return StudentSamples(dataset, _encoder(student), rows, cache, limits, numbers)


def _encoder(student: VisionLanguageModel) -> Encoder:
    return Encoder(student.processor, student.image_token_id, student.max_positions)


def _eval_samples(settings: TrainSettings, student: VisionLanguageModel) -> EvaluationSamples | None:
    if settings.eval_data is None:
        return None
    dataset = Dataset(settings.eval_data, settings.image_root)
    return EvaluationSamples(dataset, _encoder(student))


def _shard_sizes(cache: Cache | None, selection: Selection | None, n_rows: int) -> list[int]:
    if cache is not None and selection is not None:
        return selection.shard_sizes(cache)
    return [min(ROWS_PER_SHARD, n_rows - start) for start in range(0, n_rows, ROWS_PER_SHARD)]


def _facts(settings: TrainSettings, cache: Cache | None, student: Student, n_samples: int) -> CardFacts:
    """What the model card says."""
    return CardFacts(
        student=settings.student,
        revision=settings.revision,
        licence=licence(student.vlm.path),
        model_type=student.model.config.model_type,
        vision_pool=getattr(student.model.config, "vision_pool", 1),
        n_parameters=student.n_parameters,
        n_learning=student.n_learning,
        n_samples=n_samples,
        recipe=settings.recipe,
        cache=settings.cache,
        manifest=None if cache is None else cache.manifest,
        sealed=cache is None or cache.sealed,
    )


def _first_line(settings: TrainSettings, student: Student, trainer: Any, n_samples: int) -> str:
    """What will be trained with what."""
    losses, arguments = settings.recipe.losses, trainer.args
    weights = f"alpha {losses.alpha:g}, beta {losses.beta:g}, gamma {losses.gamma:g}"
    reading = f", tail {losses.tail}, matching {losses.matching}" if settings.cache else ""
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    rates = "".join(f", {rate:g} below {name}" for name, rate in settings.recipe.student.learning_rates.items())
    return (
        f"training {settings.student} ({student.model.config.model_type}, {student.n_learning:,} of "
        f"{student.n_parameters:,} parameters learn, {student.model.dtype}) on {n_samples} samples of {settings.data}, "
        f"teacher from {settings.cache or 'nowhere'}; {weights}{reading}; learning rate {arguments.learning_rate:g}"
        f"{rates}; {length} of {arguments.per_device_train_batch_size} samples x "
        f"{arguments.gradient_accumulation_steps} micro-batches x {arguments.world_size} workers on "
        f"{arguments.device}"
    )


def _save(settings: TrainSettings, trainer: DistillationTrainer) -> None:
    """Weights, processor, model card and the recipe that made them, in one folder."""
    trainer.save_model(str(settings.output))
    if trainer.is_world_process_zero():
        recipe = yaml.safe_dump(settings.recipe.model_dump(mode="json"), sort_keys=False)
        (settings.output / "recipe.yaml").write_text(recipe)
        log(f"saved to {settings.output}")


def evaluate_checkpoint(path: str, data: str, image_root: Path | None = None, batch_size: int = 32) -> dict[str, float]:
    """Accuracy and loss of a saved model on the answers of a dataset, as `evaluate_answers` defines them."""
    vlm = load(path)
    dataset = Dataset(data, image_root)
    samples = EvaluationSamples(dataset, _encoder(vlm))
    loader = torch.utils.data.DataLoader(
        samples, batch_size=batch_size, collate_fn=Collator(vlm.processor.tokenizer.pad_token_id or 0)
    )
    return evaluate_answers(vlm.model, loader, vlm.n_tokens)
