"""The cost of pairing a student's vision token with a teacher's. No gradients.

EM-KD (arXiv 2511.21106) uses the Manhattan distance of raw vision logits. A cache holds k of the V logits of a teacher
token; all logits of an image that are not stored count as one constant c, their mean. Over the ids v stored for
teacher token j,

    cost[i, j] = F[i] + Σ_stored v ( |s[i, v] - t[j, v]| - |s[i, v] - c| ),    F[i] = Σ_all v |s[i, v] - c|

is the exact distance to t̂. There is one c per image and not one per token, because levels that differ between tokens
would hide what distinguishes the tokens. If every student token is matched (Ns <= Nt), F does not change the
assignment, and the rest needs only the logits of ids that are stored for some teacher token of the image: U of V.

With codes (see `emkd.vlm.codes`) t̂ has a value for every id. Up to EXACT ids, the distance is summed over them. Beyond,
it follows from moments over a fixed random sample of ids, as if the differences s - t̂ of a pair were normally
distributed over the ids, with mean δ and variance σ² = var s + var t̂ - 2 cov(s, t̂):

    cost[i, j] = V (δ erf(δ / √2σ) + σ √(2/π) exp(-δ² / 2σ²))

That takes matrix products alone, so that the sample can be several times as large as one whose distances are summed.
The moments of t̂ over the ids follow from those of the columns of codes, unless the teacher has a softcap: then its
logits of the sampled ids are computed, a few tokens at a time, and the moments taken from them.

In the space of log-probabilities, the logsumexp over all ids is subtracted from each token's logits before.

The sum over |s - t| copies rows [Ns] of logits, a few teacher tokens at a time so that they stay in a processor's
cache. The sum over |s - c| is an embedding bag, which copies nothing.

Shape legend: Ns, Nt vision tokens of one image in student and teacher, V ids, k stored logits, U different stored ids
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch.nn import functional

from emkd.vlm.codes import Codes
from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits

# Logits that are copied at a time, by device.
COPIED = {"cpu": 1 << 18, "other": 1 << 24}
# Student logits that are in memory at a time.
LOGITS = 1 << 25
# The largest vocabulary whose distances to t̂ from codes are summed over all ids; beyond, SAMPLED ids give moments.
EXACT = 4096
SAMPLED = 1 << 15

Space = Literal["logits", "log_probabilities"]
SPACES: tuple[str, ...] = get_args(Space)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What is compared.

    space: raw logits, the paper's, or log-probabilities, which do not depend on a token's level
    top_k: how many of a teacher token's logits count one by one, all others as one constant of the image; None for all
           that t̂ has: every id with codes, the stored ones without
    """

    space: Space = "logits"
    top_k: int | None = None


PAPERS = Cost()

Shift = tuple[torch.Tensor, torch.Tensor] | None  # what is subtracted from each token's logits: [Ns], [Nt]


@torch.no_grad()
def matching_cost(
    student_logits: torch.Tensor, teacher: TruncatedLogits, cost: Cost = PAPERS, codes: Codes | None = None
) -> torch.Tensor:
    """Return [Ns, Nt], the Manhattan distances of student logits [Ns, V] to t̂ of one image, estimated beyond EXACT ids.

    codes: the basis of the teacher's codes

    Raises ValueError if logits are cut and `teacher` has neither tail_mean nor codes.
    """
    head = LMHead(weight=student_logits.float().T, bias=None, n_tokens=student_logits.shape[1])
    return _distances(torch.eye(len(student_logits), device=student_logits.device), head, teacher, cost, codes, True)


@torch.no_grad()
def assignment_cost(
    hidden: torch.Tensor, head: LMHead, teacher: TruncatedLogits, cost: Cost = PAPERS, codes: Codes | None = None
) -> torch.Tensor:
    """Return [Ns, Nt], `matching_cost` of the head's logits for hidden states [Ns, d], without F if Ns <= Nt.

    Raises ValueError if logits are cut and `teacher` has neither tail_mean nor codes.
    """
    return _distances(hidden, head, teacher, cost, codes, len(hidden) > len(teacher.ids))


def _distances(
    hidden: torch.Tensor,
    head: LMHead,
    teacher: TruncatedLogits,
    cost: Cost,
    codes: Codes | None,
    whole: bool,
) -> torch.Tensor:
    """Return the distances. whole: with F"""
    shift = None
    if cost.space == "log_probabilities":
        shift = head.logsumexp(hidden, max(1, LOGITS // max(1, len(hidden)))), teacher.logsumexp()
    cut = teacher.k < teacher.vocabulary  # ids that the student lacks are no reason to read others from codes
    if cost.top_k is None and codes is not None and teacher.codes is not None and cut:
        return _to_codes(hidden, head, teacher, codes, shift)
    return _to_stored(hidden, head, teacher if cost.top_k is None else teacher.smaller(cost.top_k), shift, whole)


def _to_codes(hidden: torch.Tensor, head: LMHead, teacher: TruncatedLogits, codes: Codes, shift: Shift) -> torch.Tensor:
    """Return the distances to t̂ as codes give it."""
    n_tokens, read = head.n_tokens, _codes_of(teacher)
    own_shift, their_shift = (0.0, 0.0) if shift is None else (shift[0][:, None], shift[1][:, None])
    if n_tokens <= EXACT:
        ids = torch.arange(n_tokens, device=hidden.device)
        own, theirs = head.columns(hidden, ids).T - own_shift, codes.logits(read, ids) - their_shift
        return torch.cdist(own.contiguous(), theirs.contiguous(), p=1)
    ids = _sample(n_tokens, hidden.device)
    logits = [head.columns(some, ids).T for some in hidden.split(max(1, LOGITS // len(ids)))]
    # Logits have autocast's dtype; differences of nearly equal moments need float32.
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [moments(own, read, codes, ids) for own in logits]
    mean, variance = (torch.cat(list(each)) for each in zip(*parts, strict=True))
    return n_tokens * mean_absolute(mean - own_shift + (0.0 if shift is None else shift[1]), variance)


def moments(
    own: torch.Tensor, read: torch.Tensor, codes: Codes, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance [Ns, Nt], over ids, of the differences of logits [Ns, u] from those read from codes.

    read: codes [Nt, r];  ids: [u]
    """
    mean = own.mean(dim=1)
    off = own - mean[:, None]
    of_read = _of_columns if codes.after.cap is None else _of_logits
    level, theirs, covariance = of_read(off, read, codes, ids)
    variance = off.square().mean(dim=1)[:, None] + theirs - 2 * covariance
    return mean[:, None] - level, variance.clamp(min=0)


def _of_columns(
    off: torch.Tensor, read: torch.Tensor, codes: Codes, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (mean [Nt], variance [Nt], covariance [Ns, Nt] with `off`) of logits read from codes, over ids.

    off: [Ns, u] without their mean
    """
    levels, centred, spread = codes.over(ids)
    coefficients = torch.cat([read.float(), read.new_ones(len(read), 1, dtype=torch.float32)], dim=1)
    covariance = (off @ centred / len(ids)) @ coefficients.T
    return coefficients @ levels, ((coefficients @ spread) * coefficients).sum(dim=1), covariance


def _of_logits(
    off: torch.Tensor, read: torch.Tensor, codes: Codes, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `_of_columns` does, from the logits themselves: those with a softcap are not linear in codes."""
    parts = []
    for some in read.split(max(1, LOGITS // len(ids))):
        theirs = codes.logits(some, ids)
        level = theirs.mean(dim=1)
        theirs -= level[:, None]
        parts.append((level, theirs.square().mean(dim=1), off @ theirs.T / len(ids)))
    level, variance, covariance = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    return level, variance, covariance


def mean_absolute(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Return E|x| of normal x with these means and variances, of any shape."""
    deviation = variance.sqrt().clamp(min=torch.finfo(variance.dtype).tiny)
    ratio = mean / deviation
    tail = deviation * math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2)
    return mean * torch.erf(ratio / math.sqrt(2)) + tail


def _codes_of(teacher: TruncatedLogits) -> torch.Tensor:
    if teacher.codes is None:
        raise ValueError("distances to codes, of tokens without codes")
    return teacher.codes


@lru_cache(maxsize=4)
def _sample(n_tokens: int, device: torch.device) -> torch.Tensor:
    """Return the sampled ids, ascending: the same in every run."""
    chosen = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))[:SAMPLED]
    return chosen.sort().values.to(device)


def _to_stored(hidden: torch.Tensor, head: LMHead, teacher: TruncatedLogits, shift: Shift, whole: bool) -> torch.Tensor:
    """Return the distances to t̂ with one constant for logits that are not stored."""
    own = hidden.new_zeros(len(hidden), dtype=torch.float32) if shift is None else shift[0]
    if shift is not None:
        teacher = teacher.shifted(shift[1])
    ids, columns = _stored_ids(teacher)
    level = _level(teacher)
    parts = []
    size = max(1, LOGITS // max(1, len(ids)))
    for some, shifts in zip(hidden.split(size), own.split(size), strict=True):
        logits = head.columns(some, ids)
        if shift is not None:
            logits -= shifts
        part = _stored_terms(logits, columns, teacher, level)
        if level is not None and whole:
            part += _distance_to_level(some, head, level + shifts[:, None])[:, None]
        parts.append(part)
    return torch.cat(parts)


def _stored_ids(teacher: TruncatedLogits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids [U], columns [Nt, k]): the distinct stored ids, and the index of each stored id among them."""
    ids, columns = teacher.ids.unique(return_inverse=True)
    return ids, columns


def _level(teacher: TruncatedLogits) -> torch.Tensor | None:
    """Return c, a scalar; None if nothing is cut. Raises ValueError if the mean of the tail is not stored."""
    if teacher.whole:
        return None
    if teacher.tail_mean is None:
        raise ValueError("matching needs tail_mean, the mean of the logits that are not stored; these tokens have none")
    return teacher.tail_mean.mean()


def _stored_terms(
    logits: torch.Tensor, columns: torch.Tensor, teacher: TruncatedLogits, level: torch.Tensor | None
) -> torch.Tensor:
    """Return [Ns, Nt], the sum over stored ids, from student logits [U, Ns]. columns: as `_stored_ids` has them"""
    n_teacher, k = columns.shape
    n_student = logits.shape[1]
    # An id that the student lacks is at the level: its two terms cancel.
    theirs = teacher.logits if level is None else torch.where(teacher.known, teacher.logits, level)
    out = logits.new_empty(n_teacher, n_student)
    size = max(1, COPIED["cpu" if logits.device.type == "cpu" else "other"] // max(1, k * n_student))
    for start in range(0, n_teacher, size):
        rows = slice(start, start + size)
        copied = logits.index_select(0, columns[rows].flatten()).view(len(columns[rows]), k, n_student)
        torch.sum(copied.sub_(theirs[rows, :, None]).abs_(), dim=1, out=out[rows])
    if level is not None:
        out -= functional.embedding_bag(columns, (logits - level).abs_(), mode="sum")
    return out.T


def _distance_to_level(hidden: torch.Tensor, head: LMHead, level: torch.Tensor) -> torch.Tensor:
    """Return F [n] of hidden states [n, d]. level: [n, 1], c of each token's logits"""
    blocks = head.blocks(hidden, max(1, LOGITS // max(1, len(hidden))))
    return torch.stack([block.sub_(level).abs_().sum(dim=1) for block in blocks]).sum(dim=0)
