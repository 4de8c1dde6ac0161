"""KL(softmax s ‖ t̂) with its gradient in closed form, which takes two copies of the logits instead of ten.

With p = softmax(s), stored ids S, tail mass m = Σ_{v not in S} p_v of the student and m_t of the teacher, n ids in
the tail,

    KL = Σ_S p log(p / t) + { m log(m / m_t)                      bucket: the tail is one class on both sides
                            { Σ_{not S} p log(p / (m_t / n))      uniform: m_t is spread evenly over its ids
    dKL/ds_v = p_v (r_v - KL),   r_v = log(p_v / t_v) for stored ids, log(m / m_t) or log(p_v n / m_t) in the tail.

m is summed over its own terms. 1 - Σ_S p would cancel for confident tokens.

Shape legend: n tokens, V ids, k stored logits
"""

from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from emkd.vlm.truncated import TruncatedLogits

# Assumptions about the tail of a distribution whose k largest logits are all that is known.
CutTail = Literal["bucket", "uniform"]

# Ids whose products are in memory at a time.
BLOCK = 2048


def reverse_kl(student_logits: torch.Tensor, teacher: TruncatedLogits, tail: CutTail) -> torch.Tensor:
    """Return KL(softmax s ‖ t̂) of each token, [n] float32 nats, from student logits [n, V]; call backward at most once.

    bucket is a lower bound of the true KL, exact if both tails have the same shape. If nothing is cut, bucket and
    uniform are both the true KL. Raises ValueError for another tail, and if student and teacher differ in n.
    """
    if tail not in get_args(CutTail):
        raise ValueError(f"tail {tail!r}: expected one of {', '.join(get_args(CutTail))}")
    if len(student_logits) != len(teacher.ids):
        raise ValueError(
            f"logits of {len(student_logits)} student tokens, {len(teacher.ids)} teacher tokens: expected equally many"
        )
    found: torch.Tensor = _ReverseKL.apply(student_logits.float(), teacher, tail)
    return found


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher: TruncatedLogits, tail: CutTail) -> torch.Tensor:
        log_t, log_t_tail = log_probabilities(teacher)
        log_p = logits - logits.logsumexp(dim=1, keepdim=True)
        log_p_stored = log_p.gather(1, teacher.ids)
        p_stored = log_p_stored.exp().masked_fill(~teacher.known, 0)
        ratio = (log_p_stored - log_t).masked_fill(~teacher.known, 0)
        kl = (p_stored * ratio).sum(dim=1)
        p = log_p.exp()
        _zero_stored(p, teacher)
        if not teacher.whole:
            mass = p.sum(dim=1)
            n_tail = teacher.n_tail
            level = (log_t_tail - n_tail.log() if tail == "uniform" else log_t_tail).masked_fill(n_tail == 0, 0)
            own = _row_products(p, log_p) if tail == "uniform" else torch.xlogy(mass, mass)
            kl += own - mass * level
        if not ctx.needs_input_grad[0]:
            return kl
        if teacher.whole:
            ctx.gradient = p
        elif tail == "uniform":
            ctx.gradient = p.mul_(log_p.sub_((level + kl)[:, None]))
        else:
            # r - KL, written so that it does not cancel if nearly all of the student's mass is in the tail.
            ratio_tail = mass.clamp(min=torch.finfo(mass.dtype).tiny).log() - level
            ctx.gradient = p.mul_((p_stored.sum(dim=1) * ratio_tail - (p_stored * ratio).sum(dim=1))[:, None])
        ctx.gradient.scatter_add_(1, teacher.ids, p_stored * (ratio - kl[:, None]))
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(scale[:, None]), None, None


def dense_reverse_kl(student_logits: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax s ‖ t) of each token, [n] float32 nats; call backward at most once.

    student_logits: [n, V];  log_t: [n, V] log-probabilities of the teacher, overwritten
    """
    found: torch.Tensor = _DenseReverseKL.apply(student_logits.float(), log_t)
    return found


class _DenseReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
        log_p = logits - logits.logsumexp(dim=1, keepdim=True)
        ratio = torch.sub(log_p, log_t, out=log_t)
        p = log_p.exp_()
        kl = _row_products(p, ratio)
        if ctx.needs_input_grad[0]:
            ctx.gradient = p.mul_(ratio.sub_(kl[:, None]))
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(scale[:, None]), None


def log_probabilities(teacher: TruncatedLogits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log t [n, k], log m_t [n]) of the teacher, at the temperature of its logits.

    If all ids of the student are stored, the tail is empty and cannot hold the mass of ids that the student lacks: t̂
    is then the teacher's distribution over the student's ids, normalized.
    """
    stored = teacher.logits.masked_fill(~teacher.known, -torch.inf).logsumexp(dim=1)
    tail = teacher.tail_logsumexp.masked_fill(teacher.n_tail == 0, -torch.inf)
    log_z = torch.logaddexp(stored, tail)
    return teacher.logits - log_z[:, None], tail - log_z


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return [n], the sums of a · b over V, a few ids at a time.

    A matrix product adds 150 thousand float32 numbers sequentially, with an error of 1e-4; `sum` adds pairwise.
    """
    blocks = zip(a.split(BLOCK, dim=1), b.split(BLOCK, dim=1), strict=True)
    return torch.stack([(left * right).sum(dim=1) for left, right in blocks]).sum(dim=0)


def _zero_stored(p: torch.Tensor, teacher: TruncatedLogits) -> None:
    """Set p [n, V] to 0 at the stored ids. Ids that the student lacks are given as id 0, which may itself be stored."""
    zero = torch.zeros_like(teacher.logits).masked_fill(~teacher.known, torch.inf)
    p.scatter_reduce_(1, teacher.ids, zero, reduce="amin")
