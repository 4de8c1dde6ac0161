"""`emkd train-student`: checks that the student can use the cache, then trains it. No teacher anywhere.

check the call -> tokenizers and data against the cache -> load and pool the student -> DistillationTrainer
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
from emkd.trainer.checks import agree_with_first_run, check_output, log, note_differences, open_cache
from emkd.trainer.distillation import DistillationTrainer
from emkd.trainer.objective import Objective
from emkd.trainer.order import ShardSampler
from emkd.trainer.recipe import Recipe
from emkd.trainer.selection import Selection, select
from emkd.trainer.settings import TrainSettings
from emkd.trainer.stream import EvaluationSamples, StudentSamples, TeacherLimits
from emkd.vlm.identity import check_shared_tokenizer, tokenizer_json
from emkd.vlm.loading import VisionLanguageModel, load, resolve
from emkd.vlm.pooling import pooled

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
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def train_student(settings: TrainSettings) -> dict[str, float]:
    """Trains and saves a student to `settings.output`; returns the metrics of the run.

    Raises UsageError and its kin (TokenizerMismatchError, DataMismatchError, OutputExistsError, ...) before
    anything is trained, CacheError where the cache is damaged or not sealed.
    """
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
    student = _load_student(settings)
    n_tokens = student.n_tokens if cache is None else min(student.n_tokens, cache.manifest.vocabulary_size)
    train = _samples(dataset, rows, student, cache, selection, recipe, n_tokens)
    note_differences(cache, student)
    agree_with_first_run(settings, cache, selection, dataset)
    trainer = DistillationTrainer(
        model=student.model,
        processor=student.processor,
        args=arguments,
        objective=Objective(
            recipe.losses.weights, n_tokens, recipe.losses.tail, recipe.losses.matching, arguments.seed
        ),
        train_dataset=train,
        sampler=ShardSampler(_shard_sizes(cache, selection, len(rows)), recipe.window, arguments.seed),
        eval_dataset=_eval_samples(settings, student),
    )
    log(_first_line(settings, student, trainer, len(rows)))
    metrics: dict[str, float] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    _save(settings, trainer, student)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    return metrics


def training_arguments(output: Path, recipe: Recipe, evaluates: bool = False) -> TrainingArguments:
    """TrainingArguments of a recipe over our defaults. Raises UsageError."""
    given = {**DEFAULTS, **recipe.training}
    if given.get("eval_strategy", "no") != "no" and not evaluates:
        raise UsageError("training.eval_strategy needs data to evaluate on: name them with --eval-data")
    try:
        arguments = TrainingArguments(
            output_dir=str(output), remove_unused_columns=False, average_tokens_across_devices=False, **given
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"the recipe's training section: {error}") from error
    if arguments.n_gpu > 1:  # Trainer would split batches over them by threads, and records cannot be split so
        log(f"{arguments.n_gpu} GPUs are visible; this version trains on one of them")
        arguments._n_gpu = 1
    return arguments


def _load_student(settings: TrainSettings) -> VisionLanguageModel:
    student = load(
        settings.student,
        revision=settings.revision,
        dtype=settings.recipe.student.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.recipe.student.vision_pool is not None:
        student.model = pooled(student.model, student.processor, settings.recipe.student.vision_pool)
    for prefix in settings.recipe.student.freeze:
        frozen = [p for name, p in student.model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            tops = sorted({".".join(name.split(".")[:2]) for name, _ in student.model.named_parameters()})
            raise UsageError(f"freeze {prefix!r}: no parameter's name begins so; there are {', '.join(tops)}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    return student


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


def _first_line(settings: TrainSettings, student: VisionLanguageModel, trainer: Any, n_samples: int) -> str:
    learning = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    losses = settings.recipe.losses
    return (
        f"training {settings.student} ({student.model.config.model_type}, {learning:,} of "
        f"{sum(p.numel() for p in student.model.parameters()):,} parameters learn, {student.model.dtype}) on "
        f"{n_samples} samples of {settings.data}, teacher from {settings.cache or 'nowhere'}; alpha {losses.alpha}, "
        f"beta {losses.beta}, gamma {losses.gamma}, tail {losses.tail}, matching {losses.matching}; "
        f"learning rate {trainer.args.learning_rate}, batch {trainer.args.train_batch_size}"
    )


def _save(settings: TrainSettings, trainer: DistillationTrainer, student: VisionLanguageModel) -> None:
    """Weights, processor and the recipe that made them, in one folder."""
    trainer.save_model(str(settings.output))
    if trainer.is_world_process_zero():
        student.processor.save_pretrained(settings.output)
        recipe = yaml.safe_dump(settings.recipe.model_dump(mode="json"), sort_keys=False)
        (settings.output / "recipe.yaml").write_text(recipe)
        log(f"saved to {settings.output}")


def evaluate_checkpoint(path: str, data: str, image_root: Path | None = None, batch_size: int = 32) -> dict[str, float]:
    """Accuracy and loss of a saved model on the answers of a dataset, as `evaluate_answers` defines them."""
    from emkd.trainer.evaluation import evaluate_answers
    from emkd.trainer.stream import Collator

    vlm = load(path)
    dataset = Dataset(data, image_root)
    samples = EvaluationSamples(dataset, _encoder(vlm))
    loader = torch.utils.data.DataLoader(
        samples, batch_size=batch_size, collate_fn=Collator(vlm.processor.tokenizer.pad_token_id or 0)
    )
    return evaluate_answers(vlm.model, loader, vlm.n_tokens)
