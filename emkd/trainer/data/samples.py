"""From cache and dataset to the batches that a student trains on.

    sample number --cache--> row, key, record      --dataset--> Sample (its key is checked)
                  --Encoder--> the student's tokens --checked against the record--> StudentSample

The student's processor makes its own tokens and pixels; the record holds what the teacher answered. Both
must be about the same text, or nothing is trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset

from emkd.agreement.agree import agree_on_row
from emkd.errors import DataMismatchError, SampleError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded, Encoder
from emkd.storage.cache import Cache
from emkd.storage.record import ImageSpan, Record
from emkd.vlm.forward import collate
from emkd.vlm.truncated import TruncatedLogits


@dataclass(frozen=True, kw_only=True)
class TeacherSample:
    """What the cache says of one sample.

    vision: t̂ of the Nt vision tokens;  answer: t̂ of the A predictions of answer tokens
    affinity: [L, Nt] float32;  images: spans into the Nt tokens
    """

    vision: TruncatedLogits
    answer: TruncatedLogits
    affinity: torch.Tensor
    images: tuple[ImageSpan, ...]

    def to(self, device: torch.device | str) -> "TeacherSample":
        return TeacherSample(
            vision=self.vision.to(device),
            answer=self.answer.to(device),
            affinity=self.affinity.to(device),
            images=self.images,
        )


@dataclass(frozen=True, kw_only=True)
class StudentSample:
    """One sample: the student's tokens, and the teacher's record where there is a cache."""

    encoded: Encoded
    teacher: TeacherSample | None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that cannot be trained on or evaluated on, and why (see `SampleError`)."""

    row: int
    reason: str
    detail: str

    @classmethod
    def of(cls, row: int, error: SampleError) -> "Skipped":
        return cls(row=row, reason=error.reason, detail=error.detail)


@dataclass(frozen=True, kw_only=True)
class TeacherLimits:
    """How much of a record is used. V, ids of the student's tokenizer, and a smaller k where asked for."""

    vocabulary: int
    n_student_tokens: int
    top_k: int | None = None

    def __call__(self, record: Record) -> TeacherSample:
        vision = TruncatedLogits.of(record.vision, self.vocabulary)
        answer = TruncatedLogits.of(record.answer, self.vocabulary)
        if self.top_k is not None:
            vision = vision.smaller(self.top_k)
        return TeacherSample(
            vision=vision.for_student(self.n_student_tokens),
            answer=answer.for_student(self.n_student_tokens),
            affinity=torch.from_numpy(record.affinity),
            images=record.images,
        )


class StudentSamples(TorchDataset[StudentSample | Skipped]):
    """Map-style dataset of the selected samples of a cache (or of the dataset's rows, where there is no cache).

    rows:     dataset row of each element
    numbers:  sample number of each element in the cache; None for all of its samples
    other_family: the teacher's is not the student's: what they write around images may differ (see `shared_text`)

    A row that the student cannot use is `Skipped`: one bad row costs no other. One that is not what the teacher saw
    is an error: DataMismatchError, TokenizerMismatchError.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        rows: Sequence[int],
        cache: Cache | None = None,
        limits: TeacherLimits | None = None,
        numbers: Sequence[int] | None = None,
        *,
        other_family: bool = False,
    ) -> None:
        self.dataset, self.encoder, self.rows = dataset, encoder, rows
        self.cache, self.limits, self.numbers = cache, limits, numbers
        self.other_family = other_family

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, element: int) -> StudentSample | Skipped:
        row = int(self.rows[element])
        try:
            sample = self.dataset.sample(row)
            encoded = self.encoder(sample)
        except SampleError as error:
            return Skipped.of(row, error)
        if self.cache is None or self.limits is None:
            return StudentSample(encoded=encoded, teacher=None)
        number = element if self.numbers is None else int(self.numbers[element])
        key = self.cache.sample_key(number)
        if sample.key != key:
            raise DataMismatchError(
                f"row {row} (id {sample.id!r}) of {self.dataset.data} is not what the teacher saw: its key is "
                f"{sample.key[:12]}, the cache has {key[:12]}. The data changed after they were cached"
            )
        record = self.cache.record(number)
        shared = agree_on_row(encoded, record, row, words=self.encoder.words, other_family=self.other_family)
        teacher = self.limits(record)
        if shared is None:
            return StudentSample(encoded=encoded, teacher=teacher)
        own = encoded.with_text(shared.own)
        return StudentSample(encoded=own, teacher=replace(teacher, affinity=teacher.affinity[shared.theirs]))


class EvaluationSamples(TorchDataset[StudentSample | Skipped]):
    """Rows to evaluate on, without a cache."""

    def __init__(self, dataset: Dataset, encoder: Encoder) -> None:
        self.dataset, self.encoder = dataset, encoder

    def __len__(self) -> int:
        return self.dataset.n_rows

    def __getitem__(self, row: int) -> StudentSample | Skipped:
        try:
            return StudentSample(encoded=self.encoder(self.dataset.sample(row)), teacher=None)
        except SampleError as error:
            return Skipped.of(row, error)


class Collator:
    """Samples of a micro-batch: padded model inputs, and the ragged rest left alone.

    {"inputs": tensors, "samples": those that can be used, "skipped": the others}. Where there are none to use (a rank
    without a share of the epoch's last samples, or nothing but bad rows) the inputs are one padding token, because
    every rank has to take part in every step.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[StudentSample | Skipped]) -> dict[str, Any]:
        usable = [sample for sample in samples if isinstance(sample, StudentSample)]
        if usable:
            inputs = collate([sample.encoded for sample in usable], self.pad_token_id)
        else:
            nothing = torch.tensor([[self.pad_token_id]])
            inputs = {"input_ids": nothing, "attention_mask": torch.ones_like(nothing)}
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        return {"inputs": inputs, "samples": usable, "skipped": skipped}
