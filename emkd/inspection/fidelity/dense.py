"""What is lost of the teacher if its logits are cut to k of V, with codes or without: in the matching and the losses.

    student's and teacher's View of an image --Dense.of--> distances and their optimum, once
        --against(cut)--> Fidelity: regret of the assignment, and for each loss its error and its gradient's

Fidelities of several images add up: the parts of a ratio are summed, not the ratios. The dense side is what EM-KD
(arXiv 2511.21106) does with the teacher in memory, written as plainly as possible, in float64 except for distances and
affinities. The cut side is the code that trains, except that training leaves out of the distances what moves no
assignment (emkd/trainer/matching/cost.py). The effect of a cut depends on the student; if there is none,
`synthetic_student` makes one.

Shape legend: Ns, Nt vision tokens of one image in student and teacher, n tokens, d hidden size, V ids, L text tokens,
A answer tokens
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from emkd.inspection.fidelity.comparison import Assignment, Comparison
from emkd.trainer.losses.divergence import Divergence, Tail, vlad
from emkd.trainer.losses.reverse_kl import CutTail
from emkd.trainer.matching.match import Pairs, assign, matching_cost
from emkd.vlm.affinity import affinity
from emkd.vlm.after_head import NOTHING, AfterHead
from emkd.vlm.codes import Codes
from emkd.vlm.truncated import TruncatedLogits

# Of teachers without codes.
TAILS: tuple[CutTail, ...] = get_args(CutTail)
# Logits that are compared at a time: float64 makes several copies of them.
CHUNK = 1 << 22


@torch.no_grad()
def dense_cost(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return Manhattan distances [Ns, Nt] of dense logits [Ns, V] and [Nt, V]. 144 x 729 of 151,936 take 40 s."""
    return torch.cdist(student.float(), teacher.float(), p=1)


def judged(cost: torch.Tensor, best: Pairs, found: Pairs) -> Assignment:
    """Return the dense distances of an image's assignments. cost: [Ns, Nt]"""
    exact = cost.double()
    n_pairs = min(cost.shape)
    random = float(exact.mean()) * n_pairs if n_pairs else 0.0
    return Assignment(found=float(exact[found].sum()), best=float(exact[best].sum()), random=random)


def regret(
    student: torch.Tensor, teacher: torch.Tensor, cut: TruncatedLogits, cost: torch.Tensor | None = None
) -> float:
    """Return the regret of one image's assignment, from logits [Ns, V] and [Nt, V].

    cost: `dense_cost` of them, if it is known already
    """
    exact = dense_cost(student, teacher) if cost is None else cost
    return judged(exact, assign(exact), assign(matching_cost(student, cut))).regret


def tails(cut: TruncatedLogits) -> tuple[Tail, ...]:
    """Return the tails that a loss may assume; the first is the default."""
    return ("codes", "uniform", "bucket") if cut.codes is not None else ("uniform", "bucket")


def kl_comparison(
    student: torch.Tensor, teacher: torch.Tensor, cut: TruncatedLogits, codes: Codes | None = None
) -> dict[Tail, Comparison]:
    """Compare, for each tail, the reverse KL of logits [n, V], summed over tokens, and its gradient.

    codes: the basis of the cut teacher's codes

    The gradient is for the student's logits.
    """
    nothing = Comparison(n=0, cut=0.0, dense=0.0, dot=0.0, cut_squared=0.0, dense_squared=0.0)
    found: dict[Tail, Comparison] = dict.fromkeys(tails(cut), nothing)
    size = max(1, CHUNK // student.shape[1])
    for start in range(0, len(student), size):
        rows = slice(start, start + size)
        own = student[rows].float()
        dense = _with_gradient(_dense_kl, own.double(), teacher[rows].double())
        for tail in found:
            loss = partial(Divergence(tail=tail), codes=codes)
            found[tail] += Comparison.of(len(own), _with_gradient(loss, own, cut.rows(rows)), dense)
    return found


def _dense_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_s, log_t = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return (log_s.exp() * (log_s - log_t)).sum(dim=1)


def _with_gradient(
    loss: Callable[..., torch.Tensor], logits: torch.Tensor, *against: Any
) -> tuple[float, torch.Tensor]:
    """(sum of a loss over tokens, its gradient for the logits)"""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()  # a copy: it may come from inference mode
        value = loss(leaf, *against).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient


def through_head(
    loss: Callable[..., torch.Tensor],
    student: torch.Tensor,
    weight: torch.Tensor | None,
    pairs: Pairs,
    teacher: Callable[[torch.Tensor], Any],
    after: AfterHead = NOTHING,
) -> tuple[float, torch.Tensor]:
    """Return (a loss of paired tokens, summed; its gradient [Ns, d] for the hidden states).

    student: logits [Ns, V];  weight: rows [V, d] of the head, None for the gradient of the head's logits, d = V
    teacher: what the loss compares with, by its indices;  after: what makes `student` of the head's logits
    """
    own, theirs = pairs
    width = student.shape[1] if weight is None else weight.shape[1]
    total, gradient = 0.0, student.new_zeros(len(student), width, dtype=torch.float32)
    size = max(1, CHUNK // student.shape[1])
    for start in range(0, len(own), size):
        rows = slice(start, start + size)
        logits = student[own[rows]].float()
        value, of_logits = _with_gradient(loss, logits, teacher(theirs[rows]))
        of_logits = after.backward(of_logits, logits)
        total += value
        gradient[own[rows]] += of_logits.float() if weight is None else of_logits.float() @ weight.float()
    return total, gradient


def vlad_comparison(
    text: torch.Tensor,
    vision: torch.Tensor,
    teacher: torch.Tensor,
    best: Pairs,
    found: Pairs,
    stored: torch.Tensor | None = None,
) -> Comparison:
    """Compare VLAD of one image at the pairs found from the cut teacher with VLAD at the best pairs.

    text: the student's [L, d];  vision: [Ns, d];  teacher: affinity [L, Nt]
    stored: the same affinity as a cache has it, if its rounding counts as part of the cut

    The gradient is for the student's hidden states.
    """
    cut = _vlad_with_gradient(text, vision, teacher if stored is None else stored, found)
    return Comparison.of(1, cut, _vlad_with_gradient(text, vision, teacher, best))


def _vlad_with_gradient(
    text: torch.Tensor, vision: torch.Tensor, teacher: torch.Tensor, pairs: Pairs
) -> tuple[float, torch.Tensor]:
    own, theirs = pairs
    with torch.enable_grad():
        leaves = [states.detach().float().clone().requires_grad_() for states in (text, vision)]
        value = vlad(affinity(leaves[0], leaves[1][own]), teacher[:, theirs])
        gradients = torch.autograd.grad(value, leaves)
    return float(value.detach()), torch.cat(gradients)


@dataclass(frozen=True, kw_only=True)
class View:
    """One model's hidden states and logits of one image and the text around it, with nothing cut.

    vision: hidden states [N, d];  text: [L, d];  vision_logits: [N, V]
    answer_logits: [A, V] that predict answer tokens; none if another image of the sample has them already
    """

    vision: torch.Tensor
    text: torch.Tensor
    vision_logits: torch.Tensor
    answer_logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The effect of a cut, summed over images.

    vsd, rld: by tail;  joint: VSD with the default tail and with the pairs found on either side, and its gradient for
              the student's hidden states;  hidden: the same with the best pairs on both sides
    """

    assignment: Assignment
    vsd: dict[Tail, Comparison]
    rld: dict[Tail, Comparison]
    vlad: Comparison
    hidden: Comparison
    joint: Comparison

    def __add__(self, other: "Fidelity") -> "Fidelity":
        return Fidelity(
            assignment=self.assignment + other.assignment,
            vsd={tail: found + other.vsd[tail] for tail, found in self.vsd.items()},
            rld={tail: found + other.rld[tail] for tail, found in self.rld.items()},
            vlad=self.vlad + other.vlad,
            hidden=self.hidden + other.hidden,
            joint=self.joint + other.joint,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return {regret, vsd: {tail: figures}, rld: {tail: figures}, vlad, vsd_hidden, vsd_joint: figures}.

        Figures are those of `Comparison.as_dict`.
        """
        return {
            "regret": self.assignment.regret,
            "vsd": {tail: found.as_dict() for tail, found in self.vsd.items()},
            "rld": {tail: found.as_dict() for tail, found in self.rld.items()},
            "vlad": self.vlad.as_dict(),
            "vsd_hidden": self.hidden.as_dict(),
            "vsd_joint": self.joint.as_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Dense:
    """One image with nothing cut. cost: [Ns, Nt];  best: pairs of the assignment of least cost

    weight: the rows [V, d] of the student's LM head; None if gradients are to be those of the logits, d = V
    after:  what the student does to its logits after the head
    exact:  VSD at the best pairs and its gradient [Ns, d]
    """

    student: View
    teacher: View
    weight: torch.Tensor | None
    after: AfterHead
    cost: torch.Tensor
    best: Pairs
    exact: tuple[float, torch.Tensor]

    @classmethod
    def of(
        cls, student: View, teacher: View, weight: torch.Tensor | None = None, after: AfterHead = NOTHING
    ) -> "Dense":
        cost = dense_cost(student.vision_logits, teacher.vision_logits)
        best = assign(cost)
        exact = through_head(_dense_kl, student.vision_logits, weight, best, lambda j: teacher.vision_logits[j], after)
        return cls(student=student, teacher=teacher, weight=weight, after=after, cost=cost, best=best, exact=exact)

    def against(
        self,
        vision: TruncatedLogits,
        answer: TruncatedLogits,
        stored_affinity: torch.Tensor | None = None,
        codes: Codes | None = None,
    ) -> Fidelity:
        """Compare a cut teacher with this dense one.

        vision: t̂ of the Nt tokens;  answer: t̂ of the A predictions
        stored_affinity: [L, Nt], `stored` of `vlad_comparison`
        codes: the basis of the cut teacher's codes

        VSD is compared at the best pairs on both sides, so that only the loss differs. The error of VLAD comes from
        the pairs, and from `stored_affinity` if it is given.
        """
        found = assign(matching_cost(self.student.vision_logits, vision, codes=codes))
        own, theirs = self.best
        loss = partial(Divergence(tail=tails(vision)[0]), codes=codes)
        hidden, joint = (
            Comparison.of(len(own), self._cut_vsd(loss, vision, pairs), self.exact) for pairs in (self.best, found)
        )
        affinities = affinity(self.teacher.text, self.teacher.vision)
        return Fidelity(
            assignment=judged(self.cost, self.best, found),
            vsd=kl_comparison(
                self.student.vision_logits[own], self.teacher.vision_logits[theirs], vision.rows(theirs), codes
            ),
            rld=kl_comparison(self.student.answer_logits, self.teacher.answer_logits, answer, codes),
            vlad=vlad_comparison(self.student.text, self.student.vision, affinities, self.best, found, stored_affinity),
            hidden=hidden,
            joint=joint,
        )

    def _cut_vsd(
        self, loss: Callable[..., torch.Tensor], vision: TruncatedLogits, pairs: Pairs
    ) -> tuple[float, torch.Tensor]:
        return through_head(loss, self.student.vision_logits, self.weight, pairs, vision.rows, self.after)
