"""The losses of EM-KD (arXiv 2511.21106) for a cached teacher: pure functions, float32, with gradients to the student.

Each returns a sum or a value per item; `objective.py` divides by the counts of the whole optimizer step.

Shape legend: n tokens, V ids of the vocabulary, k stored logits, L text tokens, P matched pairs, A answer tokens
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from emkd.trainer.losses.reverse_kl import CutTail, dense_reverse_kl, log_probabilities, reverse_kl
from emkd.vlm.codes import Codes, dense_logits
from emkd.vlm.truncated import TruncatedLogits

Tail = Literal["codes", "bucket", "uniform"]
TAILS: tuple[str, ...] = get_args(Tail)
Kind = Literal["reverse_kl", "forward_kl", "jsd"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The divergence that VSD and RLD sum up: called with student logits [n, V] and a teacher t̂, returns [n] nats.

    kind: reverse_kl  KL(softmax s ‖ t̂), the paper's
          forward_kl  KL(t̂ ‖ softmax s)
          jsd         ½ KL(p ‖ m) + ½ KL(t̂ ‖ m), p = softmax s, m = ½ (p + t̂): Jensen-Shannon, at most log 2
    tail: what t̂ has for logits that are not stored. codes reads them from codes of the hidden state, and scales them
          to the stored mass of the tail. Without codes, the cache has only this mass, and t̂ needs an assumption:
          bucket treats the logits as one class on both sides, uniform spreads their mass evenly. If nothing is cut, all
          are the true divergence.
    temperature: T divides all logits, and T² multiplies the result, so that gradients keep their size (Hinton et al.,
          arXiv 1503.02531). The mass of the tail is stored at T = 1. For a tail from codes and an evenly spread one it
          follows at any other T; for a bucket it does not, so that T ≠ 1 needs another tail.

    Raises ValueError for an unknown kind or tail, and for a temperature that is not allowed.
    """

    kind: Kind = "reverse_kl"
    tail: Tail = "uniform"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.tail not in TAILS or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"divergence {self.kind!r}, tail {self.tail!r}, temperature {self.temperature}: expected one of "
                f"{', '.join(KINDS)}, one of {', '.join(TAILS)}, and a finite temperature above 0"
            )
        if self.tail == "bucket" and self.temperature != 1:
            raise ValueError(
                f"temperature {self.temperature:g} needs the tail codes or uniform: a cache has the tail's total mass "
                "at temperature 1, and its mass at another temperature depends on how it is spread. Set tail: uniform, "
                "or temperature: 1"
            )

    def __call__(
        self, student_logits: torch.Tensor, teacher: TruncatedLogits, codes: Codes | None = None
    ) -> torch.Tensor:
        """Return the divergence of each token, [n] float32, from student logits [n, V].

        codes: the basis of the teacher's codes, for the tail codes

        Raises ValueError if that tail lacks its codes.
        """
        tail = self.tail
        if tail == "codes" and (teacher.codes is not None or teacher.k < teacher.vocabulary):
            if codes is None:
                raise ValueError("the tail codes needs a basis, and there is none")
            return self._dense(student_logits.float(), dense_logits(teacher, codes))
        cut: CutTail = "uniform" if tail == "codes" else tail  # if nothing is cut, every tail is the same
        if self.temperature != 1:
            student_logits, teacher = student_logits / self.temperature, teacher.at_temperature(self.temperature)
        if self.kind == "reverse_kl":
            found = reverse_kl(student_logits, teacher, cut)
        elif self.kind == "forward_kl":
            found = forward_kl(student_logits, teacher, cut)
        else:
            found = jsd(student_logits, teacher, cut)
        return found * self.temperature**2

    def _dense(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Return the divergence [n] from logits [n, V] of both; the teacher's are overwritten."""
        if self.temperature != 1:
            student_logits, teacher_logits = student_logits / self.temperature, teacher_logits.div_(self.temperature)
        log_t = teacher_logits.sub_(teacher_logits.logsumexp(dim=1, keepdim=True))
        if self.kind == "reverse_kl":
            found = dense_reverse_kl(student_logits, log_t)
        else:
            log_s = student_logits.log_softmax(dim=1)
            terms = log_t.exp() * (log_t - log_s) if self.kind == "forward_kl" else _jsd_terms(log_s, log_t)
            found = terms.sum(dim=1)
        return found * self.temperature**2


def forward_kl(student_logits: torch.Tensor, teacher: TruncatedLogits, tail: CutTail) -> torch.Tensor:
    """Return KL(t̂ ‖ softmax s) of each token, [n], from student logits [n, V].

    Σ_S t log(t / p) + m_t log(m_t / m) (bucket), or + Σ_{not S} u log(u / p) with u = m_t / n (uniform), for stored
    ids S and tail masses m_t of the teacher and m of the student over n ids.
    """
    log_t, log_t_tail = log_probabilities(teacher)
    log_s = student_logits.float().log_softmax(dim=1)
    log_s_stored = log_s.gather(1, teacher.ids)
    total = (log_t.exp() * (log_t - log_s_stored)).masked_fill(~teacher.known, 0).sum(dim=1)
    if teacher.whole:
        return total
    n_tail = teacher.n_tail
    log_t_tail = log_t_tail.masked_fill(n_tail == 0, 0)
    if tail == "bucket":
        terms = log_t_tail.exp() * (log_t_tail - _tail_logsumexp(log_s, teacher))
    else:
        rest = log_s.sum(dim=1) - log_s_stored.masked_fill(~teacher.known, 0).sum(dim=1)
        counts = n_tail.clamp(min=1)
        terms = log_t_tail.exp() * (log_t_tail - counts.log() - rest / counts)
    return total + terms.masked_fill(n_tail == 0, 0)


def jsd(student_logits: torch.Tensor, teacher: TruncatedLogits, tail: CutTail) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of each token, [n], from student logits [n, V].

    It is the sum over classes (stored ids, and the tail as one class or as n) of ½ t log(t / m) + ½ p log(p / m),
    m = ½ (t + p).
    """
    log_t, log_t_tail = log_probabilities(teacher)
    log_s = student_logits.float().log_softmax(dim=1)
    total = _jsd_terms(log_s.gather(1, teacher.ids), log_t).masked_fill(~teacher.known, 0).sum(dim=1)
    if teacher.whole:
        return total
    n_tail = teacher.n_tail
    log_t_tail = log_t_tail.masked_fill(n_tail == 0, 0)
    if tail == "bucket":
        terms = _jsd_terms(_tail_logsumexp(log_s, teacher), log_t_tail)
    else:
        each = _jsd_terms(log_s, (log_t_tail - n_tail.clamp(min=1).log())[:, None])
        terms = each.masked_fill(teacher.stored_mask(), 0).sum(dim=1)
    return total + terms.masked_fill(n_tail == 0, 0)


def _jsd_terms(log_p: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    log_m = torch.logaddexp(log_p, log_t) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_t.exp() * (log_t - log_m))


def _tail_logsumexp(log_s: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """Return [n], the log of the student's mass outside of the stored ids; 0 for an empty tail, to avoid NaN."""
    inside = teacher.stored_mask() & (teacher.n_tail > 0)[:, None]
    return log_s.masked_fill(inside, -torch.inf).logsumexp(dim=1)


def vlad(student_affinity: torch.Tensor, teacher_affinity: torch.Tensor) -> torch.Tensor:
    """Return VLAD of one sample, a scalar: the mean smooth L1 (β = 1) of two affinities [L, P]."""
    return torch.nn.functional.smooth_l1_loss(student_affinity.float(), teacher_affinity.float(), beta=1.0)


def supervised(student_logits: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropy in nats over answer tokens: logits [A, V] predict `answer_ids` [A]."""
    return torch.nn.functional.cross_entropy(student_logits, answer_ids, reduction="sum")
