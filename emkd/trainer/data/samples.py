"""From cache and dataset to the batches that a student trains on.

    sample number --cache--> row, key, record      --dataset--> Sample (its key is checked)
                  --Encoder--> the student's tokens --checked against the record--> StudentSample

The student's processor makes tokens and pixels; the record holds the teacher's outputs. If the two are not about the
same text, the run stops with an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info

from emkd.agreement.agree import agree_on_row
from emkd.errors import DataMismatchError, SampleError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded, Encoder
from emkd.storage.cache import Cache
from emkd.storage.record import ImageSpan, Record
from emkd.vlm.affinity import affinity
from emkd.vlm.codes import Codes
from emkd.vlm.forward import collate
from emkd.vlm.truncated import TruncatedLogits


@dataclass(frozen=True, kw_only=True)
class TeacherSample:
    """The teacher's record of one sample, as tensors.

    vision:   t̂ of the Nt vision tokens
    answer:   t̂ of the A logits that predict answer tokens
    affinity: [L, Nt] float32; None if the cache has codes of the text instead
    images:   spans into the Nt tokens
    text_codes: [L, r] int16 or int8; None if affinities are stored
    """

    vision: TruncatedLogits
    answer: TruncatedLogits
    affinity: torch.Tensor | None
    images: tuple[ImageSpan, ...]
    text_codes: torch.Tensor | None = None

    def affinity_to(self, vision: torch.Tensor, codes: Codes | None = None) -> torch.Tensor:
        """Return the affinity [L, P] of the text to some vision tokens. vision: their indices [P]

        codes: the basis of the teacher's codes; needed if affinities are not stored

        Raises ValueError if the sample has neither affinities nor all that computes them.
        """
        if self.affinity is not None:
            return self.affinity[:, vision]
        if codes is None or self.text_codes is None or self.vision.codes is None:
            raise ValueError("the sample has no affinity, and no codes to compute it from")
        return affinity(codes.hidden(self.text_codes), codes.hidden(self.vision.codes[vision]))

    def with_text(self, chosen: torch.Tensor) -> "TeacherSample":
        """Return the sample with some of its text tokens. chosen: their indices or a mask"""
        return replace(
            self,
            affinity=None if self.affinity is None else self.affinity[chosen],
            text_codes=None if self.text_codes is None else self.text_codes[chosen],
        )

    def to(self, device: torch.device | str) -> "TeacherSample":
        """Return the sample on another device."""
        return TeacherSample(
            vision=self.vision.to(device),
            answer=self.answer.to(device),
            affinity=None if self.affinity is None else self.affinity.to(device),
            images=self.images,
            text_codes=None if self.text_codes is None else self.text_codes.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class StudentSample:
    """One sample: the student's tokens, and the teacher's record (None without a cache)."""

    encoded: Encoded
    teacher: TeacherSample | None

    @property
    def n_bytes(self) -> int:
        """Memory that the sample's tensors keep, which may be larger than the tensors if they are parts of others."""
        storages = {}
        for tensor in _tensors(self.encoded, self.teacher):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def _tensors(*held: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in dataclasses and dictionaries."""
    for value in held:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(*value.values())
        elif is_dataclass(value):
            yield from _tensors(*(getattr(value, field.name) for field in fields(value)))


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that can be neither trained on nor evaluated on, with the reason (see `SampleError`)."""

    row: int
    reason: str
    detail: str

    @classmethod
    def of(cls, row: int, error: SampleError) -> "Skipped":
        """Make it of the error that reading or encoding the row raised."""
        return cls(row=row, reason=error.reason, detail=error.detail)


@dataclass(frozen=True, kw_only=True)
class TeacherLimits:
    """The part of a record that a student uses: `limits(record)` returns it as a TeacherSample.

    vocabulary:       V of the teacher
    n_student_tokens: ids of the student's tokenizer; the mass of larger ids moves to the tail
    top_k:            logits of a vision token to use; None uses all that are stored
    """

    vocabulary: int
    n_student_tokens: int
    top_k: int | None = None

    def __call__(self, record: Record) -> TeacherSample:
        """Return the part of a record that the student uses."""
        vision = TruncatedLogits.of(record.vision, self.vocabulary)
        answer = TruncatedLogits.of(record.answer, self.vocabulary)
        if self.top_k is not None:
            vision = vision.smaller(self.top_k)
        return TeacherSample(
            vision=vision.for_student(self.n_student_tokens),
            answer=answer.for_student(self.n_student_tokens),
            affinity=None if record.affinity is None else torch.from_numpy(record.affinity),
            images=record.images,
            text_codes=None if record.text_codes is None else torch.from_numpy(record.text_codes),
        )


# Bytes of samples that are kept in memory for the next epochs. A dataset that fits is decoded once; of a larger one,
# the first samples that are read are kept.
KEPT = 1 << 27


class StudentSamples(TorchDataset[StudentSample | Skipped]):
    """Map-style dataset of the selected samples of a cache, or of the dataset's rows if there is no cache.

    rows:         dataset row of each element
    numbers:      sample number of each element in the cache; None if the elements are all of its samples, in order
    other_family: whether teacher and student are of different families, which may write different tokens around
                  images (see `shared_text`)
    keep:         bytes of the samples that are kept in memory once they were read, unless a loader's worker reads them

    A row that the student cannot use is returned as `Skipped`, so that the run can continue without it. A row that
    differs from what the teacher saw raises DataMismatchError or TokenizerMismatchError.
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
        keep: int = 0,
    ) -> None:
        self.dataset, self.encoder, self.rows = dataset, encoder, rows
        self.cache, self.limits, self.numbers = cache, limits, numbers
        self.other_family = other_family
        self._kept: dict[int, StudentSample] = {}
        self._room = keep

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, element: int) -> StudentSample | Skipped:
        if element in self._kept:
            return self._kept[element]
        found = self._read(element)
        # A worker shares the memory of what it sends: a kept tensor would hold a file descriptor as long as it lives.
        if isinstance(found, StudentSample) and get_worker_info() is None and found.n_bytes <= self._room:
            self._kept[element] = found
            self._room -= found.n_bytes
        return found

    def _read(self, element: int) -> StudentSample | Skipped:
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
                f"{sample.key[:12]}, the cache has {key[:12]}. The data changed after the cache was made: restore "
                "them, or make the cache again"
            )
        record = self.cache.record(number)
        shared = agree_on_row(encoded, record, row, words=self.encoder.words, other_family=self.other_family)
        self._check_ids(encoded, row)
        teacher = self.limits(record)
        if shared is not None:
            encoded, teacher = encoded.with_text(shared.own), teacher.with_text(shared.theirs)
        return StudentSample(encoded=encoded, teacher=teacher)

    def _check_ids(self, encoded: Encoded, row: int) -> None:
        """Raise DataMismatchError for an answer with an id that the cache has no logit of.

        Only caches that emkd made before it knew tokenizers with gaps leave out ids that their teacher has.
        """
        n_tokens = self.limits.n_student_tokens if self.limits is not None else 0
        largest = int(encoded.text_ids[encoded.answer_positions].max())
        if largest >= n_tokens:
            raise DataMismatchError(
                f"row {row}: its answer has the id {largest}, and the cache has logits of ids below {n_tokens} alone: "
                "the teacher's tokenizer has gaps among its ids, which an older emkd cut. Make the cache again"
            )


class EvaluationSamples(TorchDataset[StudentSample | Skipped]):
    """Map-style dataset of rows to evaluate on, without a cache; unusable rows are returned as `Skipped`."""

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
    """Makes a micro-batch of samples: model inputs are padded, ragged records stay as they are.

    Returns {"inputs": tensors, "samples": list of StudentSample, "skipped": list of Skipped}. If no sample is usable
    (the rank got no share of the epoch's last samples, or only skipped rows), the inputs are one padding token,
    because every rank has to take part in every step.

    stand_in: of a sharded student (see data/stand_in.py): the last row of the inputs wherever no sample has an image,
              which belongs to no sample
    """

    def __init__(self, pad_token_id: int, stand_in: Encoded | None = None) -> None:
        self.pad_token_id, self.stand_in = pad_token_id, stand_in

    def __call__(self, samples: Sequence[StudentSample | Skipped]) -> dict[str, Any]:
        """Return the micro-batch of some samples."""
        usable = [sample for sample in samples if isinstance(sample, StudentSample)]
        rows = [sample.encoded for sample in usable]
        if self.stand_in is not None and not any(row.images for row in rows):
            rows.append(self.stand_in)
        if rows:
            inputs = collate(rows, self.pad_token_id)
        else:
            nothing = torch.tensor([[self.pad_token_id]])
            inputs = {"input_ids": nothing, "attention_mask": torch.ones_like(nothing)}
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        return {"inputs": inputs, "samples": usable, "skipped": skipped}
