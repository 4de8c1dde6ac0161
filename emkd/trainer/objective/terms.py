"""From hidden states of a micro-batch to its losses: which tokens have which loss, and what it compares them with.

Shape legend: T positions of a sample, d hidden size, L text tokens, Ns, Nt vision tokens in student and teacher,
P matched pairs, A answer tokens, V ids, c tokens of a chunk
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from emkd.trainer.data.samples import StudentSample, TeacherSample
from emkd.trainer.losses.chunked import Part
from emkd.trainer.losses.divergence import supervised, vlad
from emkd.trainer.matching.match import Pairs, VisionTokens
from emkd.vlm.affinity import affinity
from emkd.vlm.codes import Codes
from emkd.vlm.states import States
from emkd.vlm.truncated import TruncatedLogits, joined

# (student logits [n, V], the teacher's) -> divergence of each token [n]
Distance = Callable[[torch.Tensor, TruncatedLogits], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StudentStates:
    """The student's last hidden states of one sample, and the teacher's record (`teacher`) on the same device."""

    sample: StudentSample
    states: States
    _teacher: TeacherSample | None

    @classmethod
    def of(cls, sample: StudentSample, hidden: torch.Tensor) -> "StudentStates":
        """Take apart the hidden states [T, d] of a sample, padding included."""
        teacher = None if sample.teacher is None else sample.teacher.to(hidden.device)
        return cls(sample=sample, states=States.of(sample.encoded, hidden), _teacher=teacher)

    @property
    def teacher(self) -> TeacherSample:
        """The teacher's record. Raises ValueError if the sample has none, because the run has no cache."""
        if self._teacher is None:
            raise ValueError("a distillation loss needs the teacher's record, and this sample has none")
        return self._teacher

    def vision_tokens(self, seed: int) -> VisionTokens:
        """Return what the sample's vision tokens are matched by."""
        return VisionTokens(
            hidden=self.states.vision.detach(),
            teacher=self.teacher.vision,
            images=self.sample.encoded.images,
            teacher_images=self.teacher.images,
            seed=f"{seed}/{self.sample.encoded.key}",
        )


def answer_part(
    batch: Sequence[StudentStates], nothing: torch.Tensor, weights: dict[str, float], divergence: Distance
) -> Part:
    """Return the part of all answer tokens of a batch: Sup and RLD, if they have a weight.

    nothing: [0, d] hidden states, so that a batch without answers has the right shape, dtype and device
    """
    ids = [one.sample.encoded.text_ids[one.sample.encoded.answer_positions] for one in batch]
    targets = torch.cat([torch.zeros(0, dtype=torch.int64), *ids]).to(nothing.device)
    teacher = joined([one.teacher.answer for one in batch]) if batch and "rld" in weights else None

    def losses(logits: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        found = {"sup": supervised(logits, targets[rows])} if "sup" in weights else {}
        if teacher is not None:
            found["rld"] = divergence(logits, teacher.rows(rows)).sum()
        return found

    hidden = torch.cat([nothing, *(one.states.predicting for one in batch)])
    return Part(hidden=hidden, losses=losses, weights=weights)


def vision_part(
    seen: Sequence[StudentStates],
    pairs: Sequence[Pairs],
    weights: dict[str, float],
    divergence: Distance,
    share: float = 1.0,
) -> Part:
    """Return the part of matched pairs: VSD. seen: the samples that have pairs, at least one

    share: of each sample's pairs that is taken, drawn from torch's random state. Each pair that is taken counts for as
           many as it stands for, so that the expected sum is that of all pairs
    """
    chosen = [some_pairs(one, share) for one in pairs]
    teacher = joined([one.teacher.vision.rows(theirs) for one, (_, theirs) in zip(seen, chosen, strict=True)])
    hidden = torch.cat([one.states.vision[own] for one, (own, _) in zip(seen, chosen, strict=True)])
    times = [len(all_own) / len(own) for (all_own, _), (own, _) in zip(pairs, chosen, strict=True)]
    counted = [torch.full((len(own),), n, device=hidden.device) for n, (own, _) in zip(times, chosen, strict=True)]
    factors = torch.cat(counted)

    def losses(logits: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        found = divergence(logits, teacher.rows(rows))
        return {"vsd": (found if share == 1 else found * factors[rows]).sum()}

    return Part(hidden=hidden, losses=losses, weights=weights)


def some_pairs(pairs: Pairs, share: float) -> Pairs:
    """Return a random share of a sample's pairs, at least one, drawn from torch's random state without replacement."""
    own, theirs = pairs
    n = max(1, round(share * len(own)))
    if n == len(own):
        return pairs
    chosen = torch.randperm(len(own))[:n].to(own.device)
    return own[chosen], theirs[chosen]


def vlad_sum(seen: Sequence[StudentStates], pairs: Sequence[Pairs], codes: Codes | None = None) -> torch.Tensor:
    """Return VLAD summed over the samples that have pairs (at least one), a scalar with gradients.

    codes: the basis of the teacher's codes, for caches that do not store affinities
    """
    found = [
        vlad(affinity(one.states.text, one.states.vision[own]), one.teacher.affinity_to(theirs, codes))
        for one, (own, theirs) in zip(seen, pairs, strict=True)
    ]
    return torch.stack(found).sum()
