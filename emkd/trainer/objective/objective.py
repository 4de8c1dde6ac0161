"""The training objective: all losses of a micro-batch, divided by the counts of the whole optimizer step.

    total = α·Sup + (1 - α)·RLD + β·VSD + γ·VLAD            (EM-KD, arXiv 2511.21106)

Sup and RLD are sums over answer tokens, divided by the number of answer tokens; VSD is a sum over matched pairs,
divided by the number of pairs; VLAD is the mean over samples that have pairs. All of them are taken over the whole
optimizer step, so that gradient accumulation, the number of ranks and text-only rows do not change the gradient.

The model is called for its hidden states alone:

    hidden states --match--> pairs
    hidden states of answer tokens and pairs --Part--> Sup, RLD, VSD through the LM head, chunk by chunk
    hidden states of text and pairs --> VLAD, which needs no logits
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emkd.samples.encode import Encoded
from emkd.trainer.data.samples import StudentSample
from emkd.trainer.losses.chunked import Part, head_losses
from emkd.trainer.losses.divergence import Divergence
from emkd.trainer.losses.weights import Weights
from emkd.trainer.matching.assignment import Solver
from emkd.trainer.matching.cost import PAPERS, Cost
from emkd.trainer.matching.match import Matching, Pairs, count_pairs, match
from emkd.trainer.matching.stopwatch import Stopwatch
from emkd.trainer.objective.counts import Counts
from emkd.trainer.objective.hidden_states import HiddenStates
from emkd.trainer.objective.terms import StudentStates, answer_part, vision_part, vlad_sum
from emkd.vlm.codes import Codes
from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits

REVERSE_KL = Divergence()


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a micro-batch, already divided by their counts over the optimizer step.

    total: the weighted sum, a scalar; call backward on it once

    All others are for the log and have no gradients:
    sup, rld, vsd, vlad:         scalars, each loss without its weight; 0 for a loss whose weight is 0
    retained_mass, lacking_mass: [teacher's vision tokens of the micro-batch] (see `TruncatedLogits`)
    answer_lacking_mass:         [answer tokens]; empty if RLD has no weight
    """

    total: torch.Tensor
    sup: torch.Tensor
    rld: torch.Tensor
    vsd: torch.Tensor
    vlad: torch.Tensor
    retained_mass: torch.Tensor
    lacking_mass: torch.Tensor
    answer_lacking_mass: torch.Tensor


class Objective:
    """Computes the losses of micro-batches of `StudentSample`s.

    n_tokens: V, the ids that student and teacher share; padding rows of the student's LM head are cut
    seed:     of random matching; not used otherwise
    solver:   of the assignments (see matching/assignment.py); each solver finds a least total cost
    cost:     what matching by logits compares (see matching/cost.py)
    codes:    the basis of the teacher's codes, on the model's device; None if the cache has none
    stand_in: of a sharded student (see data/stand_in.py)
    vision_share: of the pairs, that VSD takes at each step (see `vision_part`)

    The attribute `stopwatch` runs while assignments are solved.
    """

    def __init__(
        self,
        weights: Weights,
        n_tokens: int,
        divergence: Divergence = REVERSE_KL,
        matching: Matching = "logits",
        seed: int = 0,
        solver: Solver = "scipy",
        cost: Cost = PAPERS,
        codes: Codes | None = None,
        stand_in: Encoded | None = None,
        vision_share: float = 1.0,
    ) -> None:
        self.weights, self.n_tokens, self.divergence = weights, n_tokens, divergence
        self.matching, self.seed, self.solver = matching, seed, solver
        self.cost, self.codes, self.stand_in = cost, codes, stand_in
        self.vision_share = vision_share
        self.stopwatch = Stopwatch()
        self._hidden_states = HiddenStates(n_tokens, stand_in)

    def count(self, samples: Sequence[StudentSample]) -> Counts:
        """Return the counts of a micro-batch, which are known before its forward pass."""
        pairs = [self._n_pairs(sample) for sample in samples]
        return Counts(
            answers=sum(len(sample.encoded.answer_positions) for sample in samples),
            pairs=sum(pairs),
            vision_samples=sum(n > 0 for n in pairs),
        )

    def _n_pairs(self, sample: StudentSample) -> int:
        if sample.teacher is None or not self.weights.needs_vision:
            return 0
        return count_pairs(self.matching, sample.encoded.images, sample.teacher.images)

    def __call__(
        self, model: Any, base: Any, inputs: dict[str, torch.Tensor], samples: Sequence[StudentSample], counts: Counts
    ) -> Losses:
        """Return the losses of one micro-batch.

        model:  the model to call, which may be wrapped for data parallelism;  base: the model itself
        counts: of the whole optimizer step

        Without samples (see `Collator`) all losses are 0, with gradients of 0. Under autocast, hidden states have its
        dtype; losses are computed in float32. Raises ModelError in the first batch for a model that is not supported
        (vlm/checks.py).
        """
        hidden, connection = self._hidden_states(model, base, inputs, samples)
        batch = [StudentStates.of(sample, states) for sample, states in zip(samples, hidden, strict=False)]
        seen = [one for one in batch if self._n_pairs(one.sample)]
        head = LMHead.of(base, self.n_tokens)
        pairs = self.match(head, seen)
        total, sums = head_losses(head, self._parts(batch, seen, pairs, counts, hidden[0, :0]))
        none = total.new_zeros(())
        answered = batch if self.weights.named.get("rld") else []
        affinities = vlad_sum(seen, pairs, self.codes) / counts.vision_samples if seen and self.weights.gamma else none
        return Losses(
            total=total + self.weights.gamma * affinities + connection,
            sup=sums.get("sup", none) / max(1, counts.answers),
            rld=sums.get("rld", none) / max(1, counts.answers),
            vsd=sums.get("vsd", none) / max(1, counts.pairs),
            vlad=affinities.detach(),
            retained_mass=torch.cat([none[None][:0], *(s.teacher.vision.retained_mass() for s in seen)]),
            lacking_mass=torch.cat([none[None][:0], *(s.teacher.vision.lacking_mass() for s in seen)]),
            answer_lacking_mass=torch.cat([none[None][:0], *(s.teacher.answer.lacking_mass() for s in answered)]),
        )

    def _parts(
        self,
        batch: Sequence[StudentStates],
        seen: Sequence[StudentStates],
        pairs: Sequence[Pairs],
        counts: Counts,
        none: torch.Tensor,
    ) -> list[Part]:
        """Return what goes through the LM head. none: [0, d] hidden states"""
        divisors = {"sup": counts.answers, "rld": counts.answers, "vsd": counts.pairs}
        weights = {name: self.weights.named.get(name, 0) / max(1, n) for name, n in divisors.items()}
        answers = {name: weights[name] for name in ("sup", "rld") if weights[name]}
        parts = [answer_part(batch if answers else [], none, answers, self._distance)]
        if seen and weights["vsd"]:
            parts.append(vision_part(seen, pairs, {"vsd": weights["vsd"]}, self._distance, self.vision_share))
        return parts

    def match(self, head: LMHead, seen: Sequence[StudentStates]) -> list[Pairs]:
        """Return the pairs of each sample in `seen`, which all have some."""
        tokens = [one.vision_tokens(self.seed) for one in seen]
        return match(self.matching, tokens, head, self.solver, self.stopwatch, self.cost, self.codes)

    def _distance(self, logits: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
        """Return the divergence [n] of the student's logits [n, V] from the teacher's."""
        return self.divergence(logits, teacher, self.codes)
