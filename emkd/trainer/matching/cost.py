"""What it costs to match a student's vision token with a teacher's. No gradients.

EM-KD (arXiv 2511.21106) takes the Manhattan distance of raw vision logits. A cache holds k of the V logits of a
teacher token; all missing ones of an image count as one constant c, their mean. Over the ids v stored for teacher
token j,

    cost[i, j] = F[i] + Σ_stored v ( |s[i, v] - t[j, v]| - |s[i, v] - c| ),    F[i] = Σ_all v |s[i, v] - c|

is the exact distance to t̂. One c for the image, not one for each token: levels that differ between tokens drown
what distinguishes them. Where every student token is matched (Ns <= Nt), F moves no assignment, and what is left
needs the logits of the ids that are stored for some teacher token of the image, and no other: U of V.

The sum of the first terms is taken over copied rows [Ns] of logits, a few teacher tokens at a time so that they stay
in a processor's cache, and that of the second by an embedding bag, which copies nothing.

Shape legend: Ns, Nt vision tokens of one image in student and teacher, V ids, k stored logits, U different stored ids
"""

import torch
from torch.nn import functional

from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits

# Numbers that are copied at a time, by device.
COPIED = {"cpu": 1 << 18, "other": 1 << 24}
# Student logits that exist at a time.
LOGITS = 1 << 25


@torch.no_grad()
def matching_cost(student_logits: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """[Ns, Nt] Manhattan distances of given student logits [Ns, V] to t̂ of one image."""
    ids, place = _stored_ids(teacher)
    level = _level(teacher)
    cost = _stored_terms(student_logits.float()[:, ids].T.contiguous(), place, teacher, level)
    return cost if level is None else cost + (student_logits.float() - level).abs().sum(dim=1, keepdim=True)


@torch.no_grad()
def assignment_cost(hidden: torch.Tensor, head: LMHead, teacher: TruncatedLogits) -> torch.Tensor:
    """[Ns, Nt], `matching_cost` of the logits that the head gives hidden states [Ns, d], but for F where Ns <= Nt."""
    ids, place = _stored_ids(teacher)
    level = _level(teacher)
    parts = []
    for some in hidden.split(max(1, LOGITS // max(1, len(ids)))):
        cost = _stored_terms(head.columns(some, ids), place, teacher, level)
        if level is not None and len(hidden) > len(teacher.ids):
            cost += _distance_to_level(some, head, level)[:, None]
        parts.append(cost)
    return torch.cat(parts)


def _stored_ids(teacher: TruncatedLogits) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [U], place [Nt, k]): the different ids that are stored, and where among them each stored one is."""
    ids, place = teacher.ids.unique(return_inverse=True)
    return ids, place


def _level(teacher: TruncatedLogits) -> torch.Tensor | None:
    """c, a scalar; None where nothing is missing. Raises ValueError for logits without the mean of their tail."""
    if teacher.whole:
        return None
    if teacher.tail_mean is None:
        raise ValueError("tokens are matched by the mean of the logits that are not stored, and these have none")
    return teacher.tail_mean.mean()


def _stored_terms(
    columns: torch.Tensor, place: torch.Tensor, teacher: TruncatedLogits, level: torch.Tensor | None
) -> torch.Tensor:
    """[Ns, Nt] the sum over stored ids, from student logits [U, Ns]."""
    n_teacher, k = place.shape
    n_student = columns.shape[1]
    # An id that the student lacks is at the level: its two terms cancel.
    logits = teacher.logits if level is None else torch.where(teacher.known, teacher.logits, level)
    out = columns.new_empty(n_teacher, n_student)
    size = max(1, COPIED["cpu" if columns.device.type == "cpu" else "other"] // max(1, k * n_student))
    for start in range(0, n_teacher, size):
        rows = slice(start, start + size)
        copied = columns.index_select(0, place[rows].flatten()).view(len(place[rows]), k, n_student)
        torch.sum(copied.sub_(logits[rows, :, None]).abs_(), dim=1, out=out[rows])
    if level is not None:
        out -= functional.embedding_bag(place, (columns - level).abs_(), mode="sum")
    return out.T


def _distance_to_level(hidden: torch.Tensor, head: LMHead, level: torch.Tensor) -> torch.Tensor:
    """F [n] of hidden states [n, d]."""
    blocks = head.blocks(hidden, max(1, LOGITS // max(1, len(hidden))))
    return torch.stack([block.sub_(level).abs_().sum(dim=1) for block in blocks]).sum(dim=0)
