"""Which student vision token is paired with which teacher vision token. No gradients.

EM-KD (arXiv 2511.21106): image by image, a one-to-one assignment of least total Manhattan distance between vision
logits (Hungarian algorithm), or between log-probabilities. cost.py defines the distance if the cache holds k of V
logits; assignment.py solves the assignments.

Shape legend: Ns, Nt vision tokens in student and teacher, d hidden size, P matched pairs
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from emkd.errors import DataMismatchError, UsageError
from emkd.storage.record import ImageSpan
from emkd.trainer.matching.assignment import Pairs, Solver, assign, solve
from emkd.trainer.matching.cost import PAPERS, Cost, assignment_cost, matching_cost
from emkd.trainer.matching.stopwatch import Stopwatch
from emkd.vlm.codes import Codes
from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits

__all__ = ["MATCHINGS", "Matching", "Pairs", "VisionTokens", "assign", "count_pairs", "match", "matching_cost"]

Matching = Literal["logits", "pooled", "random"]
MATCHINGS: tuple[str, ...] = get_args(Matching)


@dataclass(frozen=True, kw_only=True)
class VisionTokens:
    """All vision tokens of one sample, in both models.

    hidden:         [Ns, d] of the student
    teacher:        t̂ of the teacher's Nt tokens
    images:         spans into the student's Ns tokens
    teacher_images: spans into the teacher's Nt tokens
    seed:           of random matching; not used otherwise
    """

    hidden: torch.Tensor
    teacher: TruncatedLogits
    images: Sequence[ImageSpan]
    teacher_images: Sequence[ImageSpan]
    seed: str

    def by_image(self) -> Iterator[tuple[ImageSpan, ImageSpan]]:
        """Return pairs of (student, teacher) spans. Raises DataMismatchError if the numbers of images differ."""
        if len(self.images) != len(self.teacher_images):
            raise DataMismatchError(
                f"a sample has {len(self.images)} images for the student and {len(self.teacher_images)} in the cache; "
                "expected the same number"
            )
        return zip(self.images, self.teacher_images, strict=True)


@torch.no_grad()
def match(
    method: Matching,
    samples: Sequence[VisionTokens],
    head: LMHead,
    solver: Solver = "scipy",
    stopwatch: Stopwatch | None = None,
    cost: Cost = PAPERS,
    codes: Codes | None = None,
) -> list[Pairs]:
    """Return the pairs of each sample: indices [P] into its student and its teacher vision tokens, image by image.

    method: logits  the assignment of least cost; all images of all samples are solved in parallel
            pooled  every teacher token with the student token whose grid cell contains it. As
                    Σ_j KL(s ‖ t_j) = n·KL(s ‖ normalized geometric mean of t_j) + const, this is distillation from
                    average-pooled logits.
            random  a random one-to-one assignment, a function of the sample's seed: the control of an ablation
    head:   of the student;  solver: of the assignments
    stopwatch: runs while assignments are solved, not while costs are computed
    cost:   what the method logits compares;  codes: the basis of the teacher's codes, None if it has none

    Raises DataMismatchError if a sample has a different number of images from the cache, UsageError if grids do not
    allow pooled matching, TrainingDivergedError if a cost is not finite.
    """
    images = [(sample, n, *spans) for sample in samples for n, spans in enumerate(sample.by_image())]
    if method == "logits":
        costs = [_cost(sample, own, theirs, head, cost, codes) for sample, _, own, theirs in images]
        found = solve(costs, solver, stopwatch)
    elif method == "pooled":
        found = [_by_cell(own, theirs) for _, _, own, theirs in images]
    else:
        found = [_random(own.count, theirs.count, f"{sample.seed}/{n}") for sample, n, own, theirs in images]
    pairs = iter(found)
    return [_whole_sample(sample, pairs) for sample in samples]


def _cost(
    sample: VisionTokens, own: ImageSpan, theirs: ImageSpan, head: LMHead, cost: Cost, codes: Codes | None
) -> torch.Tensor:
    hidden = sample.hidden[own.start : own.start + own.count]
    teacher = sample.teacher.rows(slice(theirs.start, theirs.start + theirs.count))
    return assignment_cost(hidden, head, teacher, cost, codes)


def _whole_sample(sample: VisionTokens, pairs: Iterator[Pairs]) -> Pairs:
    """Return the next images' pairs, as indices into the sample's tokens."""
    device = sample.hidden.device
    own, theirs = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for image, teacher_image in sample.by_image():
        i, j = next(pairs)
        own.append(i + image.start)
        theirs.append(j + teacher_image.start)
    return torch.cat([part.to(device) for part in own]), torch.cat([part.to(device) for part in theirs])


def count_pairs(method: Matching, student_images: Sequence[ImageSpan], teacher_images: Sequence[ImageSpan]) -> int:
    """Return the number of pairs that `match` will find, which is known before the forward pass."""
    if method == "pooled":
        return sum(image.count for image in teacher_images)
    return sum(min(a.count, b.count) for a, b in zip(student_images, teacher_images, strict=False))


def _by_cell(own: ImageSpan, theirs: ImageSpan) -> Pairs:
    if len(own.grids) != 1 or len(theirs.grids) != 1:
        raise UsageError("--matching pooled needs images of one tile with a known grid; use --matching logits")
    (rows, columns), (teacher_rows, teacher_columns) = own.grids[0], theirs.grids[0]
    if teacher_rows % rows or teacher_columns % columns:
        raise UsageError(
            f"--matching pooled needs a teacher grid that is a multiple of the student's {rows} x {columns}, got "
            f"{teacher_rows} x {teacher_columns}; use --matching logits"
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
