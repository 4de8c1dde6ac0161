"""`emkd train-student`: checks that the student can use the cache, then trains it. No teacher anywhere.

check the call -> tokenizers and data against the cache -> load and pool the student -> DistillationTrainer
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, set_seed

from emkd.errors import InputNotFoundError, OutputExistsError, UsageError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer.distillation import DistillationTrainer
from emkd.trainer.objective import Objective
from emkd.trainer.order import ShardSampler
from emkd.trainer.recipe import Recipe
from emkd.trainer.stream import StudentSamples, TeacherLimits, rows_of_cache
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


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The arguments of `emkd train-student`; `recipe` has the command line's flags in it already.

    cache: may be left out where all three distillation weights are off (α = 1, β = γ = 0)
    """

    student: str
    data: str
    output: Path
    recipe: Recipe
    cache: str | None = None
    image_root: Path | None = None
    eval_data: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    partial: bool = False
    resume: bool = False


def train_student(settings: TrainSettings) -> dict[str, float]:
    """Trains and saves a student to `settings.output`; returns the metrics of the run.

    Raises UsageError and its kin (TokenizerMismatchError, DataMismatchError, OutputExistsError, ...) before
    anything is trained, CacheError where the cache is damaged or not sealed.
    """
    recipe = settings.recipe
    checkpoint = _check_output(settings)
    cache = _open_cache(settings)
    dataset = Dataset(settings.data, settings.image_root)
    if cache is not None:
        check_shared_tokenizer(cache.tokenizer_json, tokenizer_json(resolve(settings.student, settings.revision)))
    rows = list(range(dataset.n_rows)) if cache is None else rows_of_cache(cache, dataset, _log)
    arguments = training_arguments(settings.output, recipe)
    set_seed(arguments.seed)
    student = _load_student(settings)
    n_tokens = student.n_tokens if cache is None else min(student.n_tokens, cache.manifest.vocabulary_size)
    train = _samples(dataset, rows, student, cache, recipe, n_tokens)
    trainer = DistillationTrainer(
        model=student.model,
        processor=student.processor,
        args=arguments,
        objective=Objective(
            recipe.losses.weights, n_tokens, recipe.losses.tail, recipe.losses.matching, arguments.seed
        ),
        train_dataset=train,
        sampler=ShardSampler(_shard_sizes(cache, len(rows)), recipe.window, arguments.seed),
        eval_dataset=_eval_samples(settings, student),
    )
    _log(_first_line(settings, student, trainer, len(rows)))
    metrics: dict[str, float] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    _save(settings, trainer, student)
    return metrics


def training_arguments(output: Path, recipe: Recipe) -> TrainingArguments:
    """TrainingArguments of a recipe over our defaults. Raises UsageError."""
    given = {**DEFAULTS, **recipe.training}
    try:
        return TrainingArguments(
            output_dir=str(output), remove_unused_columns=False, average_tokens_across_devices=False, **given
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"the recipe's training section: {error}") from error


def _check_output(settings: TrainSettings) -> str | None:
    """The checkpoint to go on from, None for a new run. Raises OutputExistsError, InputNotFoundError."""
    output = settings.output
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[-1]))
    if settings.resume:
        if not checkpoints:
            raise InputNotFoundError(f"--resume: {output} has no checkpoint; start without --resume")
        return str(checkpoints[-1])
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise OutputExistsError(
            f"--output {output} exists and is not empty; name another folder"
            + (", or go on from its last checkpoint with --resume" if checkpoints else "")
        )
    return None


def _open_cache(settings: TrainSettings) -> Cache | None:
    weights = settings.recipe.losses.weights
    if settings.cache is None:
        if weights.needs_cache:
            raise UsageError(
                f"--cache is missing: only plain fine-tuning (--alpha 1 --beta 0 --gamma 0) works without one, and the "
                f"weights are alpha {weights.alpha}, beta {weights.beta}, gamma {weights.gamma}"
            )
        return None
    cache = Cache.open(settings.cache, partial=settings.partial, window=settings.recipe.window)
    stored = cache.manifest.top_k
    if settings.recipe.losses.top_k is not None and settings.recipe.losses.top_k > stored:
        raise UsageError(f"losses.top_k {settings.recipe.losses.top_k}: the cache stores {stored}")
    if not cache.sealed:
        _log(f"{settings.cache} is not sealed: training on the {cache.n_samples} samples that are committed")
    return cache


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
    recipe: Recipe,
    n_tokens: int,
) -> StudentSamples:
    limits = None
    if cache is not None:
        limits = TeacherLimits(
            vocabulary=cache.manifest.vocabulary_size, n_student_tokens=n_tokens, top_k=recipe.losses.top_k
        )
    return StudentSamples(dataset, _encoder(student), rows, cache, limits)


def _encoder(student: VisionLanguageModel) -> Encoder:
    return Encoder(student.processor, student.image_token_id, student.max_positions)


def _eval_samples(settings: TrainSettings, student: VisionLanguageModel) -> StudentSamples | None:
    if settings.eval_data is None:
        return None
    dataset = Dataset(settings.eval_data, settings.image_root)
    return StudentSamples(dataset, _encoder(student), range(dataset.n_rows))


def _shard_sizes(cache: Cache | None, n_rows: int) -> list[int]:
    if cache is not None:
        return list(cache.shard_sizes)
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
        _log(f"saved to {settings.output}")


def _log(text: str) -> None:
    print(text, file=sys.stderr)


def evaluate_checkpoint(path: str, data: str, image_root: Path | None = None, batch_size: int = 32) -> dict[str, float]:
    """Accuracy and loss of a saved model on the answers of a dataset, as `evaluate_answers` defines them."""
    from emkd.trainer.evaluation import evaluate_answers
    from emkd.trainer.stream import Collator

    vlm = load(path)
    dataset = Dataset(data, image_root)
    samples = StudentSamples(dataset, _encoder(vlm), range(dataset.n_rows))
    loader = torch.utils.data.DataLoader(
        samples, batch_size=batch_size, collate_fn=Collator(vlm.processor.tokenizer.pad_token_id or 0)
    )
    return evaluate_answers(vlm.model, loader, vlm.n_tokens)
