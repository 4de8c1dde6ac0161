"""t̂ written out over the whole vocabulary, in float64: what the fast losses and costs are compared with."""

import torch

from emkd.vlm.truncated import TruncatedLogits, truncated


def cut(logits: torch.Tensor, k: int) -> TruncatedLogits:
    """TruncatedLogits of dense logits [n, V], by sorting; the tail in float64."""
    n, vocabulary = logits.shape
    order = logits.argsort(dim=1, descending=True, stable=True)
    rest = logits.double().gather(1, order[:, k:])
    empty = k == vocabulary
    return truncated(
        order[:, :k],
        logits.gather(1, order[:, :k]),
        torch.full((n,), -torch.inf) if empty else rest.logsumexp(1).float(),
        vocabulary,
        torch.zeros(n) if empty else rest.mean(1).float(),
    )


def probabilities(teacher: TruncatedLogits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stored [n, V] bool, p of the stored ids [n, V], tail mass [n]), float64; of all ids that the student has."""
    n, vocabulary = teacher.ids.shape[0], teacher.vocabulary
    stored = torch.zeros(n, vocabulary, dtype=torch.bool)
    weight = torch.zeros(n, vocabulary, dtype=torch.float64)
    for row in range(n):
        for token, logit, known in zip(teacher.ids[row], teacher.logits[row], teacher.known[row], strict=True):
            if known:
                stored[row, token] = True
                weight[row, token] = logit.double().exp()
    tail = torch.where(stored.all(1), 0, teacher.tail_logsumexp.double().exp())
    whole = weight.sum(1) + tail
    return stored, weight / whole[:, None], tail / whole


def reverse_kl(student: torch.Tensor, teacher: TruncatedLogits, tail: str) -> torch.Tensor:
    return divergence("reverse_kl", student, teacher, tail)


def divergence(kind: str, student: torch.Tensor, teacher: TruncatedLogits, tail: str) -> torch.Tensor:
    """[n] by summing over ids (uniform) or over the stored ids and one class for the rest (bucket)."""
    s = student.double().softmax(1)
    stored, p, mass = probabilities(teacher)
    total = torch.zeros(len(s), dtype=torch.float64)
    for row in range(len(s)):
        inside = stored[row]
        ours, theirs = s[row][inside], p[row][inside]
        if (~inside).any():
            if tail == "bucket":
                ours, theirs = torch.cat([ours, s[row][~inside].sum()[None]]), torch.cat([theirs, mass[row][None]])
            else:
                even = (mass[row] / (~inside).sum()).expand(int((~inside).sum()))
                ours, theirs = torch.cat([ours, s[row][~inside]]), torch.cat([theirs, even])
        middle = (ours + theirs) / 2
        total[row] = {
            "reverse_kl": lambda a, b, _: kl(a, b),
            "forward_kl": lambda a, b, _: kl(b, a),
            "jsd": lambda a, b, m: (kl(a, m) + kl(b, m)) / 2,
        }[kind](ours, theirs, middle)
    return total


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


def cost(student: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """[Ns, Nt] Manhattan distances to t̂ with one constant level for everything missing."""
    level = teacher.tail_mean.double().mean()
    dense = level.expand(len(teacher.ids), teacher.vocabulary).clone()
    for row in range(len(dense)):
        dense[row, teacher.ids[row][teacher.known[row]]] = teacher.logits[row][teacher.known[row]].double()
    return torch.cdist(student.double(), dense, p=1)
