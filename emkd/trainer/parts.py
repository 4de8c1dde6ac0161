"""From hidden states of a micro-batch to its losses: which tokens have which loss, against what of the teacher's.

Shape legend: T positions of a sample, d hidden size, L text tokens, Ns, Nt vision tokens in student and teacher,
P matched pairs, A answer tokens, V ids, c tokens of a chunk
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emkd.trainer.chunked import Part
from emkd.trainer.losses import Divergence, supervised, vlad
from emkd.trainer.matching import Pairs, VisionTokens
from emkd.trainer.stream import StudentSample, TeacherSample
from emkd.trainer.truncated import joined
from emkd.vlm.affinity import affinity


@dataclass(frozen=True, kw_only=True)
class States:
    """The student's last hidden states of one sample, and the teacher's record on the same device.

    hidden: [T, d], padding included
    """

    sample: StudentSample
    hidden: torch.Tensor
    record: TeacherSample | None

    @classmethod
    def of(cls, hidden: torch.Tensor, sample: StudentSample) -> "States":
        record = None if sample.teacher is None else sample.teacher.to(hidden.device)
        return cls(sample=sample, hidden=hidden, record=record)

    @property
    def teacher(self) -> TeacherSample:
        if self.record is None:
            raise ValueError("a distillation loss needs the teacher's record, and this sample has none")
        return self.record

    def predicting(self) -> torch.Tensor:
        """[A, d] at the positions that predict answer tokens."""
        return self.hidden[self.sample.encoded.predicting_positions.to(self.hidden.device)]

    def text(self) -> torch.Tensor:
        """[L, d]"""
        return self.hidden[self.sample.encoded.text_positions.to(self.hidden.device)]

    def vision(self) -> torch.Tensor:
        """[Ns, d]"""
        encoded = self.sample.encoded
        return self.hidden[: encoded.n_tokens][encoded.vision_mask.to(self.hidden.device)]

    def vision_tokens(self, seed: int) -> VisionTokens:
        """What they are matched by."""
        return VisionTokens(
            hidden=self.vision().detach(),
            teacher=self.teacher.vision,
            images=self.sample.encoded.images,
            teacher_images=self.teacher.images,
            seed=f"{seed}/{self.sample.encoded.key}",
        )


def answer_part(
    batch: Sequence[States], nothing: torch.Tensor, weights: dict[str, float], divergence: Divergence
) -> Part:
    """Sup and RLD, whichever has a weight, of all answer tokens of a batch.

    nothing: [0, d] hidden states, what there is of a batch without answers
    """
    ids = [states.sample.encoded.text_ids[states.sample.encoded.answer_positions] for states in batch]
    targets = torch.cat([torch.zeros(0, dtype=torch.int64), *ids]).to(nothing.device)
    teacher = joined([states.teacher.answer for states in batch]) if batch and "rld" in weights else None

    def losses(logits: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        found = {"sup": supervised(logits, targets[rows])} if "sup" in weights else {}
        if teacher is not None:
            found["rld"] = divergence(logits, teacher.rows(rows)).sum()
        return found

    hidden = torch.cat([nothing, *(states.predicting() for states in batch)])
    return Part(hidden=hidden, losses=losses, weights=weights)


def vision_part(
    seen: Sequence[States], pairs: Sequence[Pairs], weights: dict[str, float], divergence: Divergence
) -> Part:
    """VSD of all matched pairs of the samples that have any (at least one)."""
    teacher = joined([states.teacher.vision.rows(theirs) for states, (_, theirs) in zip(seen, pairs, strict=True)])

    def losses(logits: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        return {"vsd": divergence(logits, teacher.rows(rows)).sum()}

    hidden = torch.cat([states.vision()[own] for states, (own, _) in zip(seen, pairs, strict=True)])
    return Part(hidden=hidden, losses=losses, weights=weights)


def vlad_sum(seen: Sequence[States], pairs: Sequence[Pairs]) -> torch.Tensor:
    """VLAD summed over the samples that have pairs (at least one), a scalar with gradients."""
    found = [
        vlad(affinity(states.text(), states.vision()[own]), states.teacher.affinity[:, theirs])
        for states, (own, theirs) in zip(seen, pairs, strict=True)
    ]
    return torch.stack(found).sum()
