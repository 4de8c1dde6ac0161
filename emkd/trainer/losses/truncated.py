"""The teacher's distributions with their tails: what a cache gives back of the logits.

Shape legend: n tokens, k stored logits, V ids that teacher and student share (the tail is the rest of them)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TruncatedLogits:
    """t̂: the stored logits of n tokens, and what is known of the others.

    ids:            [n, k] int64
    logits:         [n, k] float32, descending
    tail_logsumexp: [n] of the V - k logits not stored; -inf for an empty tail
    tail_mean:      [n] mean of those logits, 0 for an empty tail (answers have none: it serves the matching)
    known:          [n, k] bool; False where the student has no such id, its mass being in the tail
    vocabulary:     V
    """

    ids: torch.Tensor
    logits: torch.Tensor
    tail_logsumexp: torch.Tensor
    tail_mean: torch.Tensor
    known: torch.Tensor
    vocabulary: int

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])

    @property
    def whole(self) -> bool:
        """True where nothing is cut: every logit of the vocabulary is stored."""
        return self.k == self.vocabulary and bool(self.known.all())

    @property
    def n_tail(self) -> torch.Tensor:
        """[n] ids outside of the stored ones."""
        return self.vocabulary - self.known.sum(dim=1)

    def stored_mask(self) -> torch.Tensor:
        """[n, V] bool, True at the stored ids."""
        counts = torch.zeros(len(self.ids), self.vocabulary, dtype=torch.uint8, device=self.ids.device)
        return counts.scatter_add_(1, self.ids, self.known.to(torch.uint8)) > 0

    def retained_mass(self) -> torch.Tensor:
        """[n] share of the teacher's probability that the stored logits (of ids that the student has) hold."""
        stored = self.logits.masked_fill(~self.known, -torch.inf).logsumexp(dim=1)
        return torch.sigmoid(stored - self.tail_logsumexp)

    def lacking_mass(self) -> torch.Tensor:
        """[n] share of the teacher's probability that stored logits hold of ids that the student lacks (the tail has
        it)."""
        stored = self.logits.masked_fill(~self.known, -torch.inf).logsumexp(dim=1)
        lacking = self.logits.masked_fill(self.known, -torch.inf).logsumexp(dim=1)
        return torch.exp(lacking - torch.logaddexp(stored, self.tail_logsumexp))

    def rows(self, chosen: torch.Tensor | slice) -> "TruncatedLogits":
        """The same for some of the tokens."""
        return TruncatedLogits(
            ids=self.ids[chosen],
            logits=self.logits[chosen],
            tail_logsumexp=self.tail_logsumexp[chosen],
            tail_mean=self.tail_mean[chosen],
            known=self.known[chosen],
            vocabulary=self.vocabulary,
        )

    def to(self, device: torch.device | str) -> "TruncatedLogits":
        """The same on another device."""
        return TruncatedLogits(
            ids=self.ids.to(device),
            logits=self.logits.to(device),
            tail_logsumexp=self.tail_logsumexp.to(device),
            tail_mean=self.tail_mean.to(device),
            known=self.known.to(device),
            vocabulary=self.vocabulary,
        )

    def smaller(self, k: int) -> "TruncatedLogits":
        """The first k logits of each token, the dropped ones folded into the tail."""
        if k >= self.k:
            return self
        dropped = self.logits[:, k:].masked_fill(~self.known[:, k:], -torch.inf)
        n_tail = self.vocabulary - self.known.sum(dim=1)
        n_dropped = self.known[:, k:].sum(dim=1)
        total = self.tail_mean * n_tail + self.logits[:, k:].masked_fill(~self.known[:, k:], 0).sum(dim=1)
        return TruncatedLogits(
            ids=self.ids[:, :k],
            logits=self.logits[:, :k],
            tail_logsumexp=torch.logaddexp(self.tail_logsumexp, dropped.logsumexp(dim=1)),
            tail_mean=total / (n_tail + n_dropped).clamp(min=1),
            known=self.known[:, :k],
            vocabulary=self.vocabulary,
        )

    def at_temperature(self, temperature: float) -> "TruncatedLogits":
        """The same of logits divided by `temperature`, if all logits of a tail are equal (their mass evenly spread)."""
        size = self.n_tail.clamp(min=1).log()
        return TruncatedLogits(
            ids=self.ids,
            logits=self.logits / temperature,
            tail_logsumexp=(self.tail_logsumexp - size) / temperature + size,
            tail_mean=self.tail_mean / temperature,
            known=self.known,
            vocabulary=self.vocabulary,
        )

    def for_student(self, n_tokens: int) -> "TruncatedLogits":
        """The same for a student with `n_tokens` ids: mass of ids that it lacks goes into the tail."""
        if n_tokens >= self.vocabulary:
            return self
        lacking = self.known & (self.ids >= n_tokens)
        folded = self.logits.masked_fill(~lacking, -torch.inf).logsumexp(dim=1)
        return TruncatedLogits(
            ids=self.ids.masked_fill(self.ids >= n_tokens, 0),
            logits=self.logits,
            tail_logsumexp=torch.logaddexp(self.tail_logsumexp, folded),
            tail_mean=self.tail_mean,
            known=self.known & ~lacking,
            vocabulary=n_tokens,
        )


def truncated(
    ids: torch.Tensor,
    logits: torch.Tensor,
    tail_logsumexp: torch.Tensor,
    vocabulary: int,
    tail_mean: torch.Tensor | None = None,
) -> TruncatedLogits:
    """TruncatedLogits of a record's arrays; shapes as in the class."""
    return TruncatedLogits(
        ids=ids.long(),
        logits=logits.float(),
        tail_logsumexp=tail_logsumexp.float(),
        tail_mean=torch.zeros_like(tail_logsumexp) if tail_mean is None else tail_mean.float(),
        known=torch.ones_like(ids, dtype=torch.bool),
        vocabulary=vocabulary,
    )


def joined(parts: Sequence[TruncatedLogits]) -> TruncatedLogits:
    """The tokens of all parts (at least one, with the same k and vocabulary), one after the other."""
    return TruncatedLogits(
        ids=torch.cat([part.ids for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        tail_logsumexp=torch.cat([part.tail_logsumexp for part in parts]),
        tail_mean=torch.cat([part.tail_mean for part in parts]),
        known=torch.cat([part.known for part in parts]),
        vocabulary=parts[0].vocabulary,
    )
