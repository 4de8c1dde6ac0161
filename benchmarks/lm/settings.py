"""What a setting of the cache keeps of the teacher, and what is lost with it, on one kind of vision tokens.

Shape legend: Ns, Nt vision tokens, d hidden size, V ids
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.lm.kinds import SIDE
from benchmarks.lm.students import Student
from emkd.inspection.fidelity.comparison import Comparison
from emkd.inspection.fidelity.dense import Dense, View, judged, kl_comparison, through_head
from emkd.pipeline.basis import Cut
from emkd.pipeline.basis_choice import BasisChooser, bytes_of
from emkd.pipeline.capture import Teacher
from emkd.trainer.losses.divergence import Divergence, Tail
from emkd.trainer.matching.cost import Cost
from emkd.trainer.matching.match import assign, matching_cost
from emkd.vlm.codes import Codes
from emkd.vlm.states import States
from emkd.vlm.truncated import TruncatedLogits

ANSWER_TOP_K = 64
COSTS = {
    "logits": Cost(),
    "logits, 8 largest": Cost(top_k=8),
    "log-probabilities": Cost(space="log_probabilities"),
    "log-probabilities, 8 largest": Cost(space="log_probabilities", top_k=8),
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a setting keeps of held-out images, by number."""

    vision: dict[int, TruncatedLogits]
    answer: dict[int, TruncatedLogits]
    codes: Codes | None


def keep(teacher: Teacher, states: dict[int, States], k: int, codes: Codes | None) -> Kept:
    """Return k logits of each vision token and ANSWER_TOP_K of each answer, with codes or without."""

    def cut(hidden: torch.Tensor, k: int) -> TruncatedLogits:
        top = teacher.top_k(hidden, k).map(torch.clone)
        return replace(top, codes=None if codes is None else codes.encode(hidden))

    return Kept(
        vision={number: cut(each.vision, k) for number, each in states.items()},
        answer={number: cut(each.predicting, ANSWER_TOP_K) for number, each in states.items()},
        codes=codes,
    )


def vision_bytes(chooser: BasisChooser, kept: Kept, cut: Cut | None, images: Sequence[torch.Tensor]) -> float:
    """Return the bytes of a vision token for ids, logits, tails and codes.

    cut: None without codes; images: the vision states [Nt, d] of what is kept
    """
    tokens = sum(map(len, (top.ids for top in kept.vision.values())))
    logits = sum(bytes_of(top.top_logits(), chooser.manifest) for top in kept.vision.values())
    return logits / tokens + (0.0 if cut is None else chooser.code_bytes(cut, images))


def dense(teacher: Teacher, states: dict[int, States], student: Student) -> dict[int, Dense]:
    """Return each held-out image with nothing cut."""
    own = {number: _view(student.states[number], student.weight) for number in states}
    weight = teacher.vlm.model.get_output_embeddings().weight.detach()
    return {
        number: Dense.of(own[number], _view(each, weight[: teacher.vlm.n_tokens]), student.weight)
        for number, each in states.items()
    }


def _view(states: States, weight: torch.Tensor) -> View:
    vision, text, predicting = states.vision.clone(), states.text.clone(), states.predicting.clone()
    return View(vision=vision, text=text, vision_logits=vision @ weight.T, answer_logits=predicting @ weight.T)


@torch.no_grad()
def figures(exact: dict[int, Dense], kept: Kept) -> dict[str, float]:
    """Return regret, VSD's error and gradient (with the best pairs, with those found), RLD's error and gradient."""
    tail: Tail = "uniform" if kept.codes is None else "codes"
    loss = partial(Divergence(tail=tail), codes=kept.codes)
    assignments, hidden, joint, rld = [], [], [], []
    for number, each in exact.items():
        vision, student = kept.vision[number], each.student.vision_logits
        found = assign(matching_cost(student, vision, codes=kept.codes))
        assignments.append(judged(each.cost, each.best, found))
        for comparisons, pairs in ((hidden, each.best), (joint, found)):
            cut = through_head(loss, student, each.weight, pairs, vision.rows)
            comparisons.append(Comparison.of(len(pairs[0]), cut, each.exact))
        answers = kl_comparison(each.student.answer_logits, each.teacher.answer_logits, kept.answer[number], kept.codes)
        rld.append(answers[tail])
    return {
        "regret": _sum(assignments).regret,
        "vsd_error": abs(_sum(hidden).loss_error),
        "hidden_cosine": _sum(hidden).gradient_cosine,
        "joint_cosine": _sum(joint).gradient_cosine,
        "rld_error": abs(_sum(rld).loss_error),
        "rld_cosine": _sum(rld).gradient_cosine,
    }


def _sum(parts: Sequence[Any]) -> Any:
    """Of comparisons or assignments of several images."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def in_own_block(exact: dict[int, Dense], kept: Kept, costs: Sequence[str] = tuple(COSTS)) -> dict[str, float]:
    """Return, for each cost, the share of pairs whose teacher token lies in the student token's own 2 x 2 block."""
    found = {}
    for name in costs:
        shares = []
        for number, each in exact.items():
            cost = matching_cost(each.student.vision_logits, kept.vision[number], COSTS[name], kept.codes)
            shares.append(_share(*assign(cost)))
        found[name] = sum(shares) / len(shares)
    found["dense logits"] = sum(_share(*each.best) for each in exact.values()) / len(exact)
    return found


def _share(own: torch.Tensor, theirs: torch.Tensor) -> float:
    half = SIDE // 2
    same = (own // half == theirs // SIDE // 2) & (own % half == theirs % SIDE // 2)
    return float(same.double().mean())
