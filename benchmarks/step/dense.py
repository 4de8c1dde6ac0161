"""EM-KD with the teacher in memory, written directly from the paper (arXiv 2511.21106), dense and uncut.

It holds the logits of all V ids for all vision and answer tokens of both models; uses torch.cdist over the vocabulary
and SciPy sample by sample, without a cap on the number of tokens, and torch's own KL and smooth L1; and uses nothing
of emkd.trainer. It leaves out two costs of some public code: logits of the remaining text tokens, and affinities of
shape [L, P, d]. A sample has one image.

Shape legend: T positions of a sample, d hidden size, L text tokens, N vision tokens, P matched pairs, A answer tokens,
V ids
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from emkd.samples.encode import Encoded


@dataclass(frozen=True, kw_only=True)
class View:
    """One sample in one model: text [L, d], vision [N, d], vision_logits [N, V], answer_logits [A, V]."""

    text: torch.Tensor
    vision: torch.Tensor
    vision_logits: torch.Tensor
    answer_logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DenseLosses:
    """`total` is differentiated; the single losses are unweighted."""

    total: torch.Tensor
    sup: torch.Tensor
    rld: torch.Tensor
    vsd: torch.Tensor
    vlad: torch.Tensor


def views(model: Any, inputs: dict[str, torch.Tensor], encoded: Sequence[Encoded], n_tokens: int) -> list[View]:
    """Run one forward pass over a batch; inputs are on the model's device."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return [_view(model, states, item, n_tokens) for states, item in zip(hidden, encoded, strict=True)]


def _view(model: Any, states: torch.Tensor, item: Encoded, n_tokens: int) -> View:
    """states: [T, d], padding included"""
    vision = states[item.vision_mask.nonzero()[:, 0].to(states.device)]
    answers = states[item.text_positions[item.answer_positions].to(states.device) - 1]
    return View(
        text=states[item.text_positions.to(states.device)],
        vision=vision,
        vision_logits=model.lm_head(vision)[:, :n_tokens].float(),
        answer_logits=model.lm_head(answers)[:, :n_tokens].float(),
    )


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the sum of KL(softmax s ‖ softmax t) over tokens, from logits [n, V]."""
    log_s, log_t = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return functional.kl_div(log_t, log_s, reduction="sum", log_target=True)


def match(
    student: torch.Tensor, teacher: torch.Tensor, *, log_probabilities: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pairs [P], [P] of least total Manhattan distance between logits, or between log-probabilities."""
    own, theirs = student.detach(), teacher
    if log_probabilities:
        own, theirs = own.log_softmax(dim=1), theirs.log_softmax(dim=1)
    cost = torch.cdist(own, theirs, p=1)
    i, j = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(i).to(student.device), torch.from_numpy(j).to(student.device)


def affinity(text: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """Return cosines [L, P]."""
    return functional.normalize(text.float(), dim=1) @ functional.normalize(vision.float(), dim=1).T


def dense_losses(
    student: Sequence[View],
    teacher: Sequence[View],
    answer_ids: Sequence[torch.Tensor],
    *,
    alpha: float,
    beta: float,
    gamma: float,
    log_probabilities: bool = False,
) -> DenseLosses:
    """Return the losses of a batch that is one whole optimizer step.

    answer_ids: [A] for each sample;  log_probabilities: what the matching compares, instead of the paper's logits
    """
    sup, rld, vsd, vlad, n_answers, n_pairs = [], [], [], [], 0, 0
    for s, t, ids in zip(student, teacher, answer_ids, strict=True):
        i, j = match(s.vision_logits, t.vision_logits, log_probabilities=log_probabilities)
        sup.append(functional.cross_entropy(s.answer_logits, ids.to(s.text.device), reduction="sum"))
        rld.append(reverse_kl(s.answer_logits, t.answer_logits))
        vsd.append(reverse_kl(s.vision_logits[i], t.vision_logits[j]))
        vlad.append(functional.smooth_l1_loss(affinity(s.text, s.vision[i]), affinity(t.text, t.vision[j])))
        n_answers, n_pairs = n_answers + len(ids), n_pairs + len(i)
    found = {
        "sup": torch.stack(sup).sum() / n_answers,
        "rld": torch.stack(rld).sum() / n_answers,
        "vsd": torch.stack(vsd).sum() / n_pairs,
        "vlad": torch.stack(vlad).mean(),
    }
    total = alpha * found["sup"] + (1 - alpha) * found["rld"] + beta * found["vsd"] + gamma * found["vlad"]
    return DenseLosses(total=total, **{name: loss.detach() for name, loss in found.items()})
