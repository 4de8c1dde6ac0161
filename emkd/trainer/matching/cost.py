"""The cost of pairing a student's vision token with a teacher's. No gradients.

EM-KD (arXiv 2511.21106) uses the Manhattan distance of raw vision logits. A cache holds k of the V logits of a teacher
token; all logits of an image that are not stored count as one constant c, their mean. Over the ids v stored for
teacher token j,

    cost[i, j] = F[i] + Σ_stored v ( |s[i, v] - t[j, v]| - |s[i, v] - c| ),    F[i] = Σ_all v |s[i, v] - c|

is the exact distance to t̂. There is one c per image and not one per token, because levels that differ between tokens
would hide what distinguishes the tokens. If every student token is matched (Ns <= Nt), F does not change the
assignment, and the rest needs only the logits of ids that are stored for some teacher token of the image: U of V.

The sum over |s - t| copies rows [Ns] of logits, a few teacher tokens at a time so that they stay in a processor's
cache. The sum over |s - c| is an embedding bag, which copies nothing.

Shape legend: Ns, Nt vision tokens of one image in student and teacher, V ids, k stored logits, U different stored ids
"""

import torch
from torch.nn import functional

from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits

# Logits that are copied at a time, by device.
COPIED = {"cpu": 1 << 18, "other": 1 << 24}
# Student logits that are in memory at a time.
LOGITS = 1 << 25


@torch.no_grad()
def matching_cost(student_logits: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """Return [Ns, Nt], the Manhattan distances of student logits [Ns, V] to t̂ of one image.

    Raises ValueError if logits are cut and `teacher` has no tail_mean.
    """
    ids, columns = _stored_ids(teacher)
    level = _level(teacher)
    cost = _stored_terms(student_logits.float()[:, ids].T.contiguous(), columns, teacher, level)
    return cost if level is None else cost + (student_logits.float() - level).abs().sum(dim=1, keepdim=True)


@torch.no_grad()
def assignment_cost(hidden: torch.Tensor, head: LMHead, teacher: TruncatedLogits) -> torch.Tensor:
    """Return [Ns, Nt], `matching_cost` of the head's logits for hidden states [Ns, d], without F if Ns <= Nt.

    Raises ValueError if logits are cut and `teacher` has no tail_mean.
    """
    ids, columns = _stored_ids(teacher)
    level = _level(teacher)
    parts = []
    for some in hidden.split(max(1, LOGITS // max(1, len(ids)))):
        cost = _stored_terms(head.columns(some, ids), columns, teacher, level)
        if level is not None and len(hidden) > len(teacher.ids):
            cost += _distance_to_level(some, head, level)[:, None]
        parts.append(cost)
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
    """Return F [n] of hidden states [n, d]."""
    blocks = head.blocks(hidden, max(1, LOGITS // max(1, len(hidden))))
    return torch.stack([block.sub_(level).abs_().sum(dim=1) for block in blocks]).sum(dim=0)
