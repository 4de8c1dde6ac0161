"""t̂ written out over the whole vocabulary, in float64: what the fast losses and costs are compared with."""

from dataclasses import replace

import numpy as np
import torch

from emkd.storage.basis import Basis
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


def basis(seed: int, n_tokens: int, r: int = 6, step: float = 0.5) -> Basis:
    """A basis of random numbers; hidden states are r + 2 wide."""
    rng = np.random.default_rng(seed)
    return Basis(
        mean=rng.normal(size=r + 2).astype(np.float32),
        projection=rng.normal(size=(r + 2, r)).astype(np.float32),
        reconstruction=rng.normal(size=(r + 2, r)).astype(np.float32),
        head=rng.normal(size=(n_tokens, r)).astype(np.float16),
        offset=rng.normal(size=n_tokens).astype(np.float32),
        groups=(r,),
        step=step,
        logit_error=1.0,
    )


def with_codes(teacher: TruncatedLogits, seed: int, r: int = 6) -> TruncatedLogits:
    generator = torch.Generator().manual_seed(seed)
    codes = (3 * torch.randn(len(teacher.ids), r, generator=generator)).round().to(torch.int16)
    return replace(teacher, codes=codes)


def read(teacher: TruncatedLogits, found: Basis) -> torch.Tensor:
    """What codes alone say, [n, V] float64."""
    head = torch.from_numpy(found.head).double()
    logits = found.step * (teacher.codes.double() @ head.T) + torch.from_numpy(found.offset).double()
    if found.cap is not None:
        logits = found.cap * torch.tanh(logits / found.cap)
    return logits[:, : teacher.vocabulary]


def t_hat(teacher: TruncatedLogits, found: Basis) -> torch.Tensor:
    """All logits, [n, V] float64: the stored ones, and those read from codes with the stored mass of the tail."""
    logits = read(teacher, found)
    for row in range(len(logits)):
        stored = {int(i): float(x) for i, x, known in
                  zip(teacher.ids[row], teacher.logits[row], teacher.known[row], strict=True) if known}  # fmt: skip
        rest = [v for v in range(teacher.vocabulary) if v not in stored]
        if rest:
            logits[row, rest] += teacher.tail_logsumexp[row].double() - logits[row, rest].logsumexp(0)
        for token, logit in stored.items():
            logits[row, token] = logit
    return logits


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
