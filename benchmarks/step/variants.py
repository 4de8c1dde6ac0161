"""The five variants of an optimizer step that optimizer_step.py measures, on one student."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.step.cases import CACHE_NAME, CODES_NAME, ROWS_NAME, Case
from benchmarks.step.dense import DenseLosses, dense_losses, views
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.pipeline.row_reader import EncodedRow
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded, Encoder
from emkd.storage.cache import Cache
from emkd.storage.record import RowHint
from emkd.trainer.data.samples import Collator, StudentSample, StudentSamples, TeacherLimits
from emkd.trainer.losses.divergence import Divergence
from emkd.trainer.losses.weights import Weights
from emkd.trainer.objective.objective import Losses, Objective
from emkd.vlm.codes import Codes
from emkd.vlm.forward import collate, to_model

VARIANTS = ("sft", "cache", "codes", "dense", "live")
CACHES = {"cache": CACHE_NAME, "codes": CODES_NAME}
IN_MEMORY = ("dense", "live")  # variants that hold the teacher

SFT = Weights(alpha=1.0, beta=0.0, gamma=0.0)
EMKD = Weights()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch.

    inputs, samples: of the student
    encoded:         of the teacher, if it is in memory
    """

    inputs: dict[str, torch.Tensor]
    samples: list[StudentSample]
    encoded: list[Encoded]


class Steps:
    """A student, its optimizer, and the teacher if one of `variants` needs it.

    folder: holds the rows and the cache of the case
    """

    def __init__(self, case: Case, folder: Path, device: str, variants: Collection[str]) -> None:
        self.case, self.folder, self.device = case, folder, device
        self.dataset = Dataset(str(folder / ROWS_NAME))
        self.student = case.student(device)
        self.model = self.student.model.train()
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0)
        self.encoder = Encoder(self.student.processor, self.student.image_token_id)
        self.collator = Collator(self.student.processor.tokenizer.pad_token_id)
        self.teacher = _teacher(case, device) if set(variants) & set(IN_MEMORY) else None
        n_tokens = self.student.n_tokens
        self.limits = TeacherLimits(vocabulary=n_tokens, n_student_tokens=n_tokens)
        self.objectives = {name: Objective(SFT if name == "sft" else EMKD, n_tokens) for name in VARIANTS}
        if "codes" in variants and (basis := Cache.open(folder / CODES_NAME).basis) is not None:
            codes = Codes(basis, device)
            self.objectives["codes"] = Objective(EMKD, n_tokens, Divergence(tail="codes"), codes=codes)

    def load(self, variant: str) -> Batch:
        """Read the batch from files. A cache is opened again each time, so nothing is decoded beforehand."""
        return self._load(variant, self._opened(variant))

    def timed(self, variant: str) -> dict[str, float]:
        """Return the seconds of a step and of reading its batch, the assignment's share of the step, and the losses.

        Opening the cache is not timed: a run opens it once.
        """
        cache, watch = self._opened(variant), self.objectives[variant].stopwatch
        times, assignment = [self._now()], watch.seconds
        batch = self._load(variant, cache)
        times.append(self._now())
        losses = self.step(variant, batch)
        times.append(self._now())
        seconds = times[2] - times[1]
        share = (watch.seconds - assignment) / seconds
        return {"step_s": seconds, "waiting_s": times[1] - times[0], "assignment_share": share, **losses}

    def step(self, variant: str, batch: Batch) -> dict[str, float]:
        """Run one optimizer step and return its losses by name."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.case.autocast):
            losses = self._losses(variant, batch)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: float(getattr(losses, name)) for name in ("sup", "rld", "vsd", "vlad")}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _opened(self, variant: str) -> Cache | None:
        return Cache.open(self.folder / CACHES[variant]) if variant in CACHES else None

    def _load(self, variant: str, cache: Cache | None) -> Batch:
        rows = range(self.dataset.n_rows)
        limits = None if cache is None else self.limits
        samples = StudentSamples(self.dataset, self.encoder, rows, cache, limits)
        batch = self.collator([samples[number] for number in rows])
        if batch["skipped"]:
            raise RuntimeError(f"a row of the batch is skipped, expected none: {batch['skipped'][0]}")
        encoded = []
        if variant in IN_MEMORY:
            encoded = [self._held.encoder(self.dataset.sample(row)) for row in rows]
        return Batch(inputs=batch["inputs"], samples=batch["samples"], encoded=encoded)

    @property
    def _held(self) -> Teacher:
        if self.teacher is None:
            raise ValueError(f"this variant needs the teacher; name one of {', '.join(IN_MEMORY)} in `variants`")
        return self.teacher

    def _losses(self, variant: str, batch: Batch) -> Losses | DenseLosses:
        inputs = to_model(batch.inputs, self.model)
        if variant == "dense":
            return self._dense(inputs, batch)
        samples = batch.samples if variant != "live" else self._with_records(batch)
        objective = self.objectives[variant]
        return objective(self.model, self.model, inputs, samples, objective.count(samples))

    def _with_records(self, batch: Batch) -> list[StudentSample]:
        """Return the samples with the teacher's records, captured in this step."""
        rows = [
            EncodedRow(hint=RowHint(row=number, id=""), text_sha256="", encoded=item)
            for number, item in enumerate(batch.encoded)
        ]
        captured = {row.hint.row: row for row in self._held._capture_encoded(rows)}  # `capture` would encode them again
        found = []
        for number, sample in enumerate(batch.samples):
            record = captured[number].record
            if record is None:
                raise RuntimeError(f"the teacher skips row {number}: {captured[number].detail}")
            found.append(StudentSample(encoded=sample.encoded, teacher=self.limits(record)))
        return found

    def _dense(self, inputs: dict[str, torch.Tensor], batch: Batch) -> DenseLosses:
        vlm, own = self._held.vlm, [sample.encoded for sample in batch.samples]
        with torch.no_grad():
            padded = to_model(collate(batch.encoded, self._held.pad_token_id), vlm.model)
            teacher = views(vlm.model, padded, batch.encoded, vlm.n_tokens)
        student = views(self.model, inputs, own, self.student.n_tokens)
        ids = [item.text_ids[item.answer_positions] for item in own]
        return dense_losses(student, teacher, ids, alpha=EMKD.alpha, beta=EMKD.beta, gamma=EMKD.gamma)


def _teacher(case: Case, device: str) -> Teacher:
    """Return a teacher that captures what the cache holds."""
    vlm = case.teacher(device)
    k = case.top_k or vlm.n_tokens
    settings = CaptureSettings(
        top_k=k, answer_top_k=k, logits_precision=case.precision, batch_tokens=1 << 16, max_length=None
    )
    return Teacher(vlm, settings)
