"""The losses of EM-KD (arXiv 2511.21106) on what a cache gives. Pure functions, float32, gradients to the student.

Each returns a sum or a per-item value; `objective.py` divides by the counts of the whole optimizer step.

Shape legend: n tokens, V ids of the vocabulary, k stored logits, L text tokens, P matched pairs, A answer tokens
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from emkd.trainer.truncated import TruncatedLogits

Tail = Literal["bucket", "uniform"]
TAILS: tuple[str, ...] = get_args(Tail)


def reverse_kl(student_logits: torch.Tensor, teacher: TruncatedLogits, tail: Tail) -> torch.Tensor:
    """KL(softmax s ‖ t̂) of each token, [n], from student logits [n, V]. VSD and RLD are sums of it.

    The teacher's logits beyond the stored ones are known by their total mass alone, so t̂ needs an assumption:

    bucket:  the tail is one class on both sides. A lower bound of the true KL, exact where both tails have the
             same shape.
    uniform: the teacher's tail mass is spread evenly over the V - k ids.

    Where nothing is cut (an empty tail) both are the true KL. The student's tail mass is a logsumexp of its own
    logits, never 1 - Σ, which cancels for confident tokens.
    """
    if len(student_logits) != len(teacher.ids):
        raise ValueError(f"{len(student_logits)} student tokens for {len(teacher.ids)} teacher tokens")
    log_z = torch.logaddexp(_stored(teacher).logsumexp(dim=1), teacher.tail_logsumexp)
    log_t = teacher.logits - log_z[:, None]
    log_s = student_logits.log_softmax(dim=1)
    log_s_stored = log_s.gather(1, teacher.ids)
    terms = log_s_stored.exp() * (log_s_stored - log_t)
    total = terms.masked_fill(~teacher.known, 0).sum(dim=1)
    if teacher.whole:
        return total
    return total + _tail_terms(log_s, teacher, teacher.tail_logsumexp - log_z, tail)


def _stored(teacher: TruncatedLogits) -> torch.Tensor:
    return teacher.logits.masked_fill(~teacher.known, -torch.inf)


def _tail_terms(log_s: torch.Tensor, teacher: TruncatedLogits, log_t_tail: torch.Tensor, tail: Tail) -> torch.Tensor:
    """[n] what the ids outside of the stored ones add to the KL; 0 where there are none."""
    counts = torch.zeros_like(log_s, dtype=torch.uint8)
    stored = counts.scatter_add_(1, teacher.ids, teacher.known.to(torch.uint8)) > 0
    n_tail = teacher.vocabulary - stored.sum(dim=1)
    some = n_tail > 0
    log_s_tail = log_s[some].masked_fill(stored[some], -torch.inf).logsumexp(dim=1)
    if tail == "bucket":
        terms = log_s_tail.exp() * (log_s_tail - log_t_tail[some])
    else:
        log_each = log_t_tail[some] - n_tail[some].log()
        entropy = (log_s[some].exp() * log_s[some]).masked_fill(stored[some], 0).sum(dim=1)
        terms = entropy - log_s_tail.exp() * log_each
    return log_s.new_zeros(log_s.shape[0]).masked_scatter(some, terms)


def vlad(student_affinity: torch.Tensor, teacher_affinity: torch.Tensor) -> torch.Tensor:
    """Vision-language affinity distillation of one sample: mean smooth L1 (β = 1) over entries [L, P]."""
    return torch.nn.functional.smooth_l1_loss(student_affinity.float(), teacher_affinity.float(), beta=1.0)


def supervised(student_logits: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy over answer tokens: logits [A, V] that predict `answer_ids` [A]."""
    return torch.nn.functional.cross_entropy(student_logits, answer_ids, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Placeholder of the lead; helper C writes this class."""

    kind: str = "reverse_kl"
    tail: Tail = "uniform"
    temperature: float = 1.0

    def __call__(self, student_logits: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
        return reverse_kl(student_logits, teacher, self.tail)
