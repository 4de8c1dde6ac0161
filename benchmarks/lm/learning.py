"""Does a student learn from the cache what it learns from the dense teacher?

The student's states stay as they are, and an adaptor before its LM head learns by VSD alone: h + B tanh(A h). Pairs are
those that the matching finds before training, with each form of the teacher. What is learnt is how much VSD against the
dense teacher, at the best pairs, falls on held-out images; the share is that of the dense teacher's student.

Shape legend: Ns student vision tokens, d hidden size, V ids
"""

from collections.abc import Sequence

import torch

from benchmarks.lm.settings import Kept
from benchmarks.lm.students import Student
from emkd.inspection.fidelity.dense import Dense
from emkd.trainer.losses.divergence import Divergence
from emkd.trainer.losses.reverse_kl import dense_reverse_kl
from emkd.trainer.matching.match import Pairs, assign, matching_cost

RANK, STEPS, BATCH, RATE = 64, 80, 1, 1e-3


class Adaptor(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(width, RANK, bias=False)
        self.outer = torch.nn.Linear(RANK, width, bias=False)
        torch.nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = hidden + self.outer(torch.tanh(self.inner(hidden)))
        return moved


def gain(
    exact: dict[int, Dense],
    student: Student,
    train: Sequence[int],
    held_out: Sequence[int],
    kept: Kept | None,
    seed: int,
) -> float:
    """Return by how much VSD falls on held-out images. kept: the teacher's form for `train`; None: dense"""
    torch.manual_seed(seed)
    adaptor = Adaptor(student.weight.shape[1])
    optimizer = torch.optim.Adam(adaptor.parameters(), lr=RATE)
    pairs = {number: _pairs(exact[number], kept, number) for number in train}
    before = _held_out(adaptor, exact, student, held_out)
    order = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        chosen = torch.randperm(len(train), generator=order)[:BATCH].tolist()
        optimizer.zero_grad()
        for number in (train[i] for i in chosen):
            _loss(adaptor, exact[number], student, pairs[number], kept, number).mean().backward()
        optimizer.step()
    return before - _held_out(adaptor, exact, student, held_out)


def _pairs(exact: Dense, kept: Kept | None, number: int) -> Pairs:
    if kept is None:
        return exact.best
    return assign(matching_cost(exact.student.vision_logits, kept.vision[number], codes=kept.codes))


def _loss(
    adaptor: Adaptor, exact: Dense, student: Student, pairs: Pairs, kept: Kept | None, number: int
) -> torch.Tensor:
    own, theirs = pairs
    logits = adaptor(exact.student.vision[own]) @ student.weight.T
    if kept is None:
        return dense_reverse_kl(logits, exact.teacher.vision_logits[theirs].log_softmax(dim=1))
    loss = Divergence(tail="codes" if kept.codes is not None else "uniform")
    return loss(logits, kept.vision[number].rows(theirs), kept.codes)


@torch.no_grad()
def _held_out(adaptor: Adaptor, exact: dict[int, Dense], student: Student, numbers: Sequence[int]) -> float:
    found = [_loss(adaptor, exact[n], student, exact[n].best, None, n).mean() for n in numbers]
    return float(torch.stack(found).mean())
