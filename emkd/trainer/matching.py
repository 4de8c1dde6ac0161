"""Which student token learns from which teacher token. No gradients.

EM-KD (arXiv 2511.21106): image by image, a one-to-one assignment of least total Manhattan distance between raw
vision logits (Hungarian algorithm). A cache holds k of the V logits of a teacher token; all missing ones of an
image count as one constant c, their mean. Then, over the ids v stored for teacher token j,

    cost[i, j] = Σ_all v |s[i, v] - c|  +  Σ_stored v ( |s[i, v] - t[j, v]| - |s[i, v] - c| )

is the exact distance to t̂, from Ns·Nt·k gathered logits. One c for the image, not one for each token: levels
that differ between tokens drown what distinguishes them.

Shape legend: Ns, Nt vision tokens of one image in student and teacher, V ids, k stored logits, P matched pairs
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from emkd.errors import DataMismatchError, TrainingDivergedError, UsageError
from emkd.storage.record import ImageSpan
from emkd.trainer.meter import Stopwatch
from emkd.trainer.truncated import TruncatedLogits

Matching = Literal["logits", "pooled", "random"]
MATCHINGS: tuple[str, ...] = get_args(Matching)

# Gathered logits that exist at a time.
CHUNK = 1 << 24

Pairs = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def matching_cost(student_logits: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """Cost matrix [Ns, Nt] of one image: Manhattan distances of student logits [Ns, V] to t̂ of Nt tokens."""
    n_teacher, k = teacher.ids.shape
    rows = max(1, CHUNK // max(1, n_teacher * k))
    level = None if teacher.whole else teacher.tail_mean.mean()
    return torch.cat([_cost_rows(part, teacher, level) for part in student_logits.split(rows)])


def _cost_rows(student: torch.Tensor, teacher: TruncatedLogits, level: torch.Tensor | None) -> torch.Tensor:
    gathered = student[:, teacher.ids]  # [rows, Nt, k]
    distance = (gathered - teacher.logits).abs()
    if level is None:
        return distance.sum(dim=2)
    stored = (distance - (gathered - level).abs()).masked_fill(~teacher.known, 0).sum(dim=2)
    return stored + (student - level).abs().sum(dim=1, keepdim=True)


def assign(cost: torch.Tensor, stopwatch: Stopwatch | None = None) -> Pairs:
    """(student, teacher) indices [P] of a one-to-one assignment of least total cost, P = min(Ns, Nt).

    stopwatch: runs while SciPy does, not while the costs are computed or copied

    Raises TrainingDivergedError where a cost is no finite number.
    """
    costs = cost.cpu().numpy().astype(np.float64)
    if not np.isfinite(costs).all():
        raise TrainingDivergedError(
            "the student's vision logits are infinite or no numbers: the training has diverged. Lower the learning "
            "rate (or warm up, clip gradients, keep weights in float32), and begin anew or from a checkpoint before it"
        )
    with stopwatch or nullcontext():
        rows, columns = linear_sum_assignment(costs)
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


@torch.no_grad()
def match_sample(
    method: Matching,
    student_logits: torch.Tensor,
    teacher: TruncatedLogits,
    student_images: Sequence[ImageSpan],
    teacher_images: Sequence[ImageSpan],
    seed: str,
    stopwatch: Stopwatch | None = None,
) -> Pairs:
    """Pairs of one sample as indices into its student and teacher vision tokens, image by image.

    logits: as above
    pooled: every teacher token with the student token whose cell it lies in. Since
            Σ_j KL(s ‖ t_j) = n·KL(s ‖ normalised geometric mean of t_j) + const, this is distillation from
            average-pooled logits.
    random: a random one-to-one assignment, a function of `seed`: the control of an ablation
    """
    if len(student_images) != len(teacher_images):
        raise DataMismatchError(
            f"a sample has {len(student_images)} images for the student and {len(teacher_images)} in the cache"
        )
    pairs = []
    for number, (own, theirs) in enumerate(zip(student_images, teacher_images, strict=True)):
        if method == "logits":
            tokens = slice(theirs.start, theirs.start + theirs.count)
            cost = matching_cost(student_logits[own.start : own.start + own.count], teacher.rows(tokens))
            found = assign(cost, stopwatch)
        elif method == "pooled":
            found = _by_cell(own, theirs)
        else:
            found = _random(own.count, theirs.count, f"{seed}/{number}")
        pairs.append((found[0] + own.start, found[1] + theirs.start))
    if not pairs:
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing
    return torch.cat([s for s, _ in pairs]), torch.cat([t for _, t in pairs])


def count_pairs(method: Matching, student_images: Sequence[ImageSpan], teacher_images: Sequence[ImageSpan]) -> int:
    """Pairs that `match_sample` will find, known before the forward pass."""
    if method == "pooled":
        return sum(image.count for image in teacher_images)
    return sum(min(a.count, b.count) for a, b in zip(student_images, teacher_images, strict=False))


def _by_cell(own: ImageSpan, theirs: ImageSpan) -> Pairs:
    if len(own.grids) != 1 or len(theirs.grids) != 1:
        raise UsageError("--matching pooled needs images of one tile whose grid is known; use --matching logits")
    (rows, columns), (teacher_rows, teacher_columns) = own.grids[0], theirs.grids[0]
    if teacher_rows % rows or teacher_columns % columns:
        raise UsageError(
            f"--matching pooled needs a teacher grid that is a multiple of the student's, not {teacher_rows} x "
            f"{teacher_columns} for {rows} x {columns}; use --matching logits"
        )
    token = torch.arange(theirs.count)
    row = token // teacher_columns // (teacher_rows // rows)
    column = token % teacher_columns // (teacher_columns // columns)
    return row * columns + column, token


def _random(n_student: int, n_teacher: int, seed: str) -> Pairs:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little"))
    n_pairs = min(n_student, n_teacher)
    student = torch.randperm(n_student, generator=generator)[:n_pairs]
    return student, torch.randperm(n_teacher, generator=generator)[:n_pairs]
