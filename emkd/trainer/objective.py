"""The training objective: all losses of a micro-batch, divided by the counts of the whole optimizer step.

    total = α·Sup + (1 - α)·RLD + β·VSD + γ·VLAD            (EM-KD, arXiv 2511.21106)

Sup and RLD are sums over answer tokens divided by their number, VSD a sum over matched pairs divided by theirs,
VLAD the mean over samples that have vision tokens: each over the optimizer step, so that neither accumulation
nor the number of ranks nor a text-only row changes the gradient.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from emkd.trainer.losses import Tail, reverse_kl, supervised, vlad
from emkd.trainer.matching import Matching, Pairs, count_pairs, match_sample
from emkd.trainer.meter import Stopwatch
from emkd.trainer.stream import StudentSample, TeacherSample
from emkd.vlm.affinity import affinity
from emkd.vlm.forward import keep_last_hidden_state, lm_logits


@dataclass(frozen=True, kw_only=True)
class Weights:
    """α, β, γ of the paper. α = 1 leaves RLD out, β = 0 VSD, γ = 0 VLAD; all three need no cache at all."""

    alpha: float = 0.5
    beta: float = 0.25
    gamma: float = 25.0

    @property
    def named(self) -> dict[str, float]:
        """Weight of each loss that has one, by the loss's name."""
        weights = {"sup": self.alpha, "rld": 1 - self.alpha, "vsd": self.beta, "vlad": self.gamma}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def needs_cache(self) -> bool:
        return set(self.named) != {"sup"}

    @property
    def needs_vision(self) -> bool:
        return self.beta != 0 or self.gamma != 0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the sums of an optimizer step are divided by."""

    answers: int
    pairs: int
    vision_samples: int

    @staticmethod
    def total(parts: Iterable["Counts"]) -> "Counts":
        return Counts.from_tensor(sum((part.as_tensor() for part in parts), torch.zeros(3, dtype=torch.int64)))

    def as_tensor(self) -> torch.Tensor:
        return torch.tensor([self.answers, self.pairs, self.vision_samples])

    @staticmethod
    def from_tensor(counts: torch.Tensor | Sequence[int]) -> "Counts":
        answers, pairs, vision_samples = (int(n) for n in counts)
        return Counts(answers=answers, pairs=pairs, vision_samples=vision_samples)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Each loss of a micro-batch, already divided by its count over the optimizer step.

    retained_mass: [teacher's vision tokens of the micro-batch], for the log alone
    """

    sup: torch.Tensor
    rld: torch.Tensor
    vsd: torch.Tensor
    vlad: torch.Tensor
    retained_mass: torch.Tensor

    def total(self, weights: Weights) -> torch.Tensor:
        """The weighted sum, a scalar; a loss without a weight is left out."""
        return torch.stack([weight * getattr(self, name) for name, weight in weights.named.items()]).sum()


class Objective:
    """Computes the losses of micro-batches of `StudentSample`s.

    n_tokens: V, ids that student and teacher share; the student's padding rows are cut
    seed:     decides random matching, nothing else

    `stopwatch` runs while assignments are solved.
    """

    def __init__(
        self, weights: Weights, n_tokens: int, tail: Tail = "uniform", matching: Matching = "logits", seed: int = 0
    ) -> None:
        self.weights, self.n_tokens, self.tail, self.matching, self.seed = weights, n_tokens, tail, matching, seed
        self.stopwatch = Stopwatch()

    def count(self, samples: Sequence[StudentSample]) -> Counts:
        """Counts of a micro-batch, known before its forward pass."""
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
        """Losses of one micro-batch; `counts` are those of the whole optimizer step.

        model: what is called (it may be wrapped for data parallelism);  base: the model itself

        Without samples (see `Collator`) all losses are 0, with gradients of 0. Models may run under autocast: logits
        and hidden states come in its dtype, all that is computed from them is float32.
        """
        with keep_last_hidden_state(base) as kept, _some_gradient(base):
            logits = model(**inputs, use_cache=False, logits_to_keep=predicting_mask(inputs, samples)).logits
        with torch.autocast(logits.device.type, enabled=False):
            sup, rld = self._answer_losses(logits.reshape(-1, logits.shape[-1])[:, : self.n_tokens].float(), samples)
        vsd, affinities = sup.new_zeros(()), sup.new_zeros(())
        masses = [sup.new_zeros(0)]
        for states, sample in zip(kept[0][: len(samples)], samples, strict=True):
            if self._n_pairs(sample):
                own = self._vision_losses(base, states, sample)
                vsd, affinities = vsd + own[0], affinities + own[1]
                masses.append(own[2])
        return Losses(
            sup=sup / max(1, counts.answers),
            rld=rld / max(1, counts.answers),
            vsd=vsd / max(1, counts.pairs),
            vlad=affinities / max(1, counts.vision_samples),
            retained_mass=torch.cat(masses),
        )

    def _answer_losses(
        self, logits: torch.Tensor, samples: Sequence[StudentSample]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over answer tokens of Sup and RLD, from logits [A of all samples, V] in the samples' order."""
        ids = [sample.encoded.text_ids[sample.encoded.answer_positions] for sample in samples]
        sup = supervised(logits, torch.cat([torch.zeros(0, dtype=torch.int64), *ids]).to(logits.device))
        rld = logits.new_zeros(())
        if self.weights.alpha == 1:
            return sup, rld
        sizes = [len(sample.encoded.answer_positions) for sample in samples]
        for part, sample in zip(logits.split(sizes), samples, strict=True):
            rld = rld + reverse_kl(part, self._teacher(sample).answer.to(logits.device), self.tail).sum()
        return sup, rld

    def _vision_losses(
        self, base: Any, states: torch.Tensor, sample: StudentSample
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of VSD over pairs, VLAD, retained mass [Nt]) of one sample from its last hidden states [T, d]."""
        teacher = self._teacher(sample).to(states.device)
        vision = states[: sample.encoded.n_tokens][sample.encoded.vision_mask.to(states.device)]
        logits = lm_logits(base, vision, self.n_tokens)
        with torch.autocast(logits.device.type, enabled=False):
            own, theirs = self.match(logits, sample.encoded.key, sample, teacher)
            vsd = affinities = logits.new_zeros(())
            if self.weights.beta:
                vsd = reverse_kl(logits[own], teacher.vision.rows(theirs), self.tail).sum()
            if self.weights.gamma:
                text = states[sample.encoded.text_positions.to(states.device)]
                affinities = vlad(affinity(text, vision[own]), teacher.affinity[:, theirs])
            return vsd, affinities, teacher.vision.retained_mass()

    def match(self, logits: torch.Tensor, key: str, sample: StudentSample, teacher: TeacherSample) -> Pairs:
        """Pairs of one sample from the student's vision logits [Ns, V]."""
        own, theirs = match_sample(
            self.matching,
            logits,
            teacher.vision,
            sample.encoded.images,
            teacher.images,
            f"{self.seed}/{key}",
            self.stopwatch,
        )
        return own.to(logits.device), theirs.to(logits.device)

    @staticmethod
    def _teacher(sample: StudentSample) -> TeacherSample:
        if sample.teacher is None:
            raise ValueError("a distillation loss needs the teacher's record, and this sample has none")
        return sample.teacher


@contextmanager
def _some_gradient(base: Any) -> Iterator[None]:
    """While open, logits that no learning parameter has a part in depend on all of them, with gradients of 0.

    Where the language model is frozen, a micro-batch without images is such a case: backward would refuse it, and
    other ranks would wait for ever for this one's gradients. It is done inside of the model's forward, because data
    parallelism looks there for the parameters that take part.
    """

    def add_nothing(module: Any, _: Any, out: Any) -> None:
        if not out.logits.requires_grad and torch.is_grad_enabled():
            learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
            out.logits = out.logits + sum(parameter.flatten()[:1].sum() for parameter in learning) * 0

    handle = base.register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()


def predicting_mask(inputs: dict[str, torch.Tensor], samples: Sequence[StudentSample]) -> torch.Tensor:
    """[B, T] bool, True at the positions whose logits predict answer tokens: row by row, in order."""
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, sample in enumerate(samples):
        mask[row, sample.encoded.predicting_positions.to(mask.device)] = True
    return mask
