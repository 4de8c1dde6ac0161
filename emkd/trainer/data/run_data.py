"""What a run trains on: a dataset, the teacher's cache, and the samples that both have."""

from dataclasses import dataclass

import torch

from emkd.agreement.agree import Agreement, Reader, TeacherSide, agree, agree_on_tokenizer
from emkd.clock import clock_of_cache, reads_clock
from emkd.errors import UsageError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.samples.render import template_of
from emkd.storage.basis import read_basis
from emkd.storage.cache import Cache
from emkd.trainer.data.run_clock import run_clock
from emkd.trainer.data.samples import KEPT, EvaluationSamples, StudentSamples, TeacherLimits
from emkd.trainer.data.selection import Selection, select
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.report import log
from emkd.vlm.codes import Codes
from emkd.vlm.identity import tokenizer_json
from emkd.vlm.loading import VisionLanguageModel, resolve

# Without a cache there are no shards; rows are read in the order of a cache with this many rows a shard.
ROWS_PER_SHARD = 256


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The dataset of a run, with its cache and the samples selected from it.

    cache, selection: None for plain fine-tuning, which needs no cache and trains on all rows
    """

    dataset: Dataset
    cache: Cache | None = None
    selection: Selection | None = None

    @property
    def n_samples(self) -> int:
        """Samples of an epoch."""
        return self.dataset.n_rows if self.selection is None else len(self.selection.rows)

    @property
    def shard_sizes(self) -> list[int]:
        """Selected samples of each shard; without a cache, of runs of ROWS_PER_SHARD rows."""
        if self.cache is not None and self.selection is not None:
            return self.selection.shard_sizes(self.cache)
        n_rows = self.dataset.n_rows
        return [min(ROWS_PER_SHARD, n_rows - start) for start in range(0, n_rows, ROWS_PER_SHARD)]

    def n_tokens(self, student: VisionLanguageModel) -> int:
        """Return V, the number of ids that student and teacher share."""
        return student.n_tokens if self.cache is None else min(student.n_tokens, self.cache.manifest.vocabulary_size)

    def codes(self, device: torch.device) -> Codes | None:
        """Return the basis of the teacher's codes on a device, None if the cache has none."""
        if self.cache is None or self.cache.manifest.basis is None:
            return None
        # Not `cache.basis`, which would keep the file's arrays in memory beside these.
        return Codes(read_basis(self.cache.files, self.cache.manifest.basis), device)

    def agree(self, student: VisionLanguageModel, *, distils: bool) -> Agreement:
        """Give the student the teacher's chat template, and log what differs without being an obstacle (see `agree`).

        Raises GeometryMismatchError, TokenizerMismatchError, ModelError.
        """
        cache = self.cache
        teacher = None if cache is None else TeacherSide.of(cache.manifest, cache.tokenizer_json)
        has_images = cache is not None and cache.totals.vision_tokens > 0
        reader = Reader(path=student.path, processor=student.processor, model_type=student.model.config.model_type)
        return agree(teacher, reader, has_images=has_images, distils=distils, warn=log)

    def clock(self, student: VisionLanguageModel, settings: TrainSettings) -> str | None:
        """Return the date that the chat template writes, None if it writes none; after `agree`.

        Raises UsageError if a cache does not keep it and the settings do not name it.
        """
        template = template_of(student.processor)
        if self.cache is None:
            return run_clock(settings) if reads_clock(template) else None
        return clock_of_cache(str(settings.cache), template, self.cache.manifest.clock, settings.clock)

    def samples(
        self, student: VisionLanguageModel, top_k: int | None, agreement: Agreement, clock: str | None = None
    ) -> StudentSamples:
        """Return the samples in the student's tokens, with `top_k` of the teacher's vision logits (None: all)."""
        own = encoder(student, clock)
        if self.cache is None or self.selection is None:
            return StudentSamples(self.dataset, own, range(self.dataset.n_rows), keep=KEPT)
        limits = TeacherLimits(
            vocabulary=self.cache.manifest.vocabulary_size, n_student_tokens=self.n_tokens(student), top_k=top_k
        )
        rows, numbers = self.selection.rows.tolist(), self.selection.numbers.tolist()
        other = agreement.other_family
        return StudentSamples(self.dataset, own, rows, self.cache, limits, numbers, other_family=other, keep=KEPT)


def open_run_data(settings: TrainSettings) -> RunData:
    """Open cache and data, and compare them and the student's tokenizer; the student's weights are not loaded.

    Raises UsageError and its subclasses (TokenizerMismatchError, DataMismatchError, ...), CacheError, DataFormatError.
    """
    cache = open_cache(settings)
    dataset = Dataset(settings.data, settings.image_root, settings.follow_links)
    unread = dataset.unread()
    if unread is not None:
        log(unread)
    if cache is None:
        return RunData(dataset=dataset)
    teacher = TeacherSide.of(cache.manifest, cache.tokenizer_json)
    agree_on_tokenizer(teacher, tokenizer_json(resolve(settings.student, settings.revision)), warn=log)
    return RunData(dataset=dataset, cache=cache, selection=select(cache, dataset, log))


def open_cache(settings: TrainSettings) -> Cache | None:
    """Open the cache; return None if no loss needs one and none is given. Raises UsageError, CacheError."""
    weights = settings.recipe.losses.weights
    if settings.cache is None:
        if weights.needs_cache:
            raise UsageError(
                f"--cache is missing: only plain fine-tuning (--alpha 1 --beta 0 --gamma 0) works without a cache, got "
                f"alpha {weights.alpha}, beta {weights.beta}, gamma {weights.gamma}"
            )
        return None
    cache = Cache.open(settings.cache, partial=settings.partial, window=settings.recipe.window)
    stored = cache.manifest.top_k
    if settings.recipe.losses.top_k is not None and settings.recipe.losses.top_k > stored:
        raise UsageError(
            f"losses.top_k {settings.recipe.losses.top_k}: the cache stores {stored} logits of a vision token; use at "
            "most that many"
        )
    losses = settings.recipe.losses
    if losses.cost_top_k is not None and losses.cost_top_k > (losses.top_k or stored):
        raise UsageError(
            f"losses.cost_top_k {losses.cost_top_k}: only {losses.top_k or stored} logits of a vision token are used; "
            "take at most that many, or null for all"
        )
    cut = losses.top_k is not None and losses.top_k < stored
    if cut and cache.manifest.codes is not None and not cache.manifest.has_codes("vision"):
        raise UsageError(
            f"losses.top_k {losses.top_k}: the cache stores all logits of vision tokens and no codes of them, so that "
            "fewer would leave their tail unknown; leave top_k out"
        )
    if losses.tail == "codes" and cache.manifest.codes is None:
        raise UsageError(
            "losses.tail codes: the cache has no codes; set tail: uniform or bucket, or make the cache with codes (see "
            "--logit-error of cache-teacher)"
        )
    if not cache.sealed:
        log(f"{settings.cache} is not sealed: training on the {cache.n_samples} samples committed so far")
    return cache


def evaluation_samples(
    settings: TrainSettings, student: VisionLanguageModel, clock: str | None
) -> EvaluationSamples | None:
    """Return the rows of --eval-data, or None without that flag. clock: as for the rows that are trained on"""
    if settings.eval_data is None:
        return None
    data = Dataset(settings.eval_data, settings.image_root, settings.follow_links)
    return EvaluationSamples(data, encoder(student, clock))


def encoder(student: VisionLanguageModel, clock: str | None) -> Encoder:
    """Return the encoder of samples into the student's tokens and pixels. clock: for a template that writes the date"""
    return Encoder(student.processor, student.image_token_id, student.max_positions, clock)
