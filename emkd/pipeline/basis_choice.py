"""Which basis a job gets: from what was asked and a few of its rows.

    rows --sample_states--> StateSample --choose--> Choice: the basis, its bytes by part, and why

The error of logits that was asked for decides the step; if there is a limit of bytes, the smallest error within it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from emkd.errors import SampleError, UsageError
from emkd.pipeline.basis import Cut, Moments, Spectrum, head_metric
from emkd.pipeline.capture import Teacher
from emkd.pipeline.out_of_memory import rows_that_fit, unless_out_of_memory
from emkd.samples.dataset import Dataset
from emkd.storage.arrays.chunks import encode_chunk
from emkd.storage.arrays.frames import encode_frame
from emkd.storage.arrays.record_arrays import TopLogitsArrays
from emkd.storage.basis import Basis
from emkd.storage.manifest.codes import CodesAsked
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.record import TopLogits
from emkd.vlm.head import LMHead
from emkd.vlm.states import States

# Vision tokens whose bytes are measured.
TOKENS = 16_384
# Errors beyond these are not tried.
LEAST, MOST = 0.05, 12.8
HALVINGS = 8


@dataclass
class StateSample:
    """Hidden states of a few rows.

    halves: their moments, of every other row; one if there is only one row
    images: [Nt, d] of the vision tokens of some rows, on the CPU
    unusable: a line for each row that cannot be used, with the reason
    """

    halves: list[Moments] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    _rows: int = 0

    def add(self, states: States) -> None:
        """Add a row."""
        both = torch.cat([states.vision, states.text])
        moments, half = Moments.of(both), self._rows % 2
        if half < len(self.halves):
            self.halves[half] = self.halves[half] + moments
        else:
            self.halves.append(moments)
        self._rows += 1
        if len(states.vision) and sum(map(len, self.images)) < TOKENS:
            self.images.append(states.vision.float().cpu())


def sample_states(teacher: Teacher, dataset: Dataset, rows: Iterable[int]) -> StateSample:
    """Return the hidden states of the rows, without those that cannot be used: the job skips them with a reason."""
    sample = StateSample()
    for row in rows:
        try:
            with rows_that_fit():
                encoded = teacher.encoder(dataset.sample(row))
        except SampleError as error:
            sample.unusable.append(f"row {row}: {error.reason}: {error.detail}")
            continue
        states = unless_out_of_memory(lambda encoded=encoded: teacher.states(encoded))  # type: ignore[misc]
        if states is not None and bool(states.vision.isfinite().all() & states.text.isfinite().all()):
            sample.add(states)
        else:
            why = "its states are not finite" if states is not None else "it does not fit the device's memory"
            sample.unusable.append(f"row {row}: {why}")
    return sample


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A basis, and what it costs.

    top_bytes, code_bytes: of a vision token; 0 if none of the rows has an image, or if all its logits are stored
    asked:                 what was asked for
    """

    basis: Basis
    top_bytes: float
    code_bytes: float
    asked: CodesAsked

    def describe(self) -> str:
        basis, limit = self.basis, self.asked.token_bytes
        wanted = self.asked.logit_error
        if wanted is None:
            why = f"the smallest error within {limit} bytes a vision token"
        elif basis.logit_error > wanted:
            why = f"{wanted:g} would take more than {limit} bytes a vision token"
        else:
            why = "as asked" if limit is None else f"it takes no more than {limit} bytes a vision token"
        bound = "" if basis.cap is None else "at most: logits have a softcap; "
        return (
            f"codes with a predicted logit error of {basis.logit_error:.3g} ({bound}{why}): {sum(basis.groups)} "
            f"columns of {len(basis.mean)}, step {basis.step:.3g}; {self.top_bytes:.0f} bytes a vision token for the "
            f"largest logits and {self.code_bytes:.0f} for codes; the basis takes {basis.n_bytes / 2**20:.1f} MiB once"
        )


class BasisChooser:
    """Tries errors on a sample of hidden states.

    head_memory: bytes that the projected head may take
    manifest:    of the job, without a basis
    """

    def __init__(self, teacher: Teacher, sample: StateSample, manifest: Manifest, head_memory: int) -> None:
        self.manifest = manifest
        head = LMHead.of(teacher.vlm.model, teacher.vlm.n_tokens)
        self.weight = head.weight[: head.n_tokens].detach()
        self._bias = None if head.bias is None else head.bias[: head.n_tokens].detach()
        self.most_columns = max(1, head_memory // (2 * head.n_tokens))
        self._after = head.after
        self.spectrum = Spectrum.of(sample.halves, head.after.scale**2 * head_metric(self.weight))
        self.n_tokens = sum(map(len, sample.images))
        self._coefficients = self._columns(sample.images)
        self.top_bytes = self._top_bytes(teacher, sample.images, manifest)

    def _top_bytes(self, teacher: Teacher, images: Sequence[torch.Tensor], manifest: Manifest) -> float:
        if not images or manifest.top_k >= manifest.vocabulary_size:
            return 0.0
        hidden = torch.cat(list(images)).to(teacher.vlm.device, teacher.vlm.model.dtype)
        top = teacher.top_k(hidden, manifest.top_k).top_logits()
        return bytes_of(top, manifest) / self.n_tokens

    def _columns(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All columns [Nt, d] of the hidden states of each image."""
        mean, projection = self.spectrum.mean.float().cpu(), self.spectrum.projection.float().cpu()
        return [(image - mean) @ projection for image in images]

    def cut(self, error: float) -> Cut:
        """Return columns and step for an error. Raises UsageError as `Spectrum.at_error`."""
        return self.spectrum.at_error(error, self.most_columns)

    def code_bytes(self, cut: Cut, images: Sequence[torch.Tensor] | None = None) -> float:
        """Return the bytes of a vision token's codes; 0 without images, and if vision tokens have no codes.

        images: hidden states [Nt, d] of each image, on the CPU; by default those of the sample
        """
        if not self.manifest.has_codes("vision"):
            return 0.0
        groups, columns = self.spectrum.groups(cut), self._coefficients if images is None else self._columns(images)
        frames = [encode_frame(self._codes(image, cut), groups) for image in columns]
        return sum(map(len, frames)) / max(1, sum(map(len, columns)))

    def _codes(self, coefficients: torch.Tensor, cut: Cut) -> np.ndarray:
        numbers = (coefficients[:, : cut.n_columns] / cut.step).round_()
        return numbers.clamp_(-32767, 32767).to(torch.int16).numpy()

    def basis(self, cut: Cut) -> Basis:
        """Return the basis of a cut."""
        return self.spectrum.basis(cut, self.weight, self._bias, self._after)

    def choose(self, asked: CodesAsked) -> Choice:
        """Return the basis for what was asked. Raises UsageError if it cannot be had."""
        cut = self.cut_for(asked)
        return Choice(basis=self.basis(cut), top_bytes=self.top_bytes, code_bytes=self.code_bytes(cut), asked=asked)

    def cut_for(self, asked: CodesAsked) -> Cut:
        """Return columns and step for what was asked. Raises UsageError if it cannot be had."""
        limit = asked.token_bytes
        first = asked.logit_error or max(LEAST, 1.001 * self.spectrum.least_error(self.most_columns))
        if limit is None:
            return self.cut(first)
        if self._fits(self.cut(first), limit):
            return self.cut(first)
        last = max(MOST, 2 * first)
        if not self._fits(self.cut(last), limit):
            codes = self.code_bytes(self.cut(last))
            raise UsageError(
                f"{limit} bytes a vision token are too few: the largest logits and their tails take "
                f"{self.top_bytes:.0f}, and codes with an error of {last:g} {codes:.0f} more; "
                "use a smaller --top-k, more --token-bytes, or --logit-error none"
            )
        for _ in range(HALVINGS):
            middle = (first * last) ** 0.5
            first, last = (first, middle) if self._fits(self.cut(middle), limit) else (middle, last)
        return self.cut(last)

    def _fits(self, cut: Cut, limit: int) -> bool:
        return self.top_bytes + self.code_bytes(cut) <= limit


def bytes_of(top: TopLogits, manifest: Manifest) -> int:
    """Return the compressed bytes of the ids, logits and tails of vision tokens."""
    plain = manifest.model_copy(update={"codes": None, "basis": None, "affinity": None})
    kinds = TopLogitsArrays.of(plain, "vision", top.k, mean=True)
    layouts = {layout.name: layout for kind in kinds.kinds for layout in kind.layouts}
    return sum(len(encode_chunk(layouts[name], array)) for name, array in kinds.encode(top).items())
