"""The teacher's distributions, cut to their largest logits, as tensors: what capture makes and losses compare with.

The torch twin of `emkd.storage.record.TopLogits`, with what else a loss has to know: the size of the vocabulary, and
which of the ids a student has.

Shape legend: n tokens, k stored logits, V ids that teacher and student share (the tail is the rest of them)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from emkd.storage.record import TopLogits


@dataclass(frozen=True, kw_only=True)
class TruncatedLogits:
    """t̂: the k largest logits of n tokens, and what is known of the others.

    ids:            [n, k] int64, by descending logit, equal logits by ascending id
    logits:         [n, k] float32
    tail_logsumexp: [n] float32 of the V - k logits that are not stored; -inf for an empty tail
    tail_mean:      [n] float32 mean of those logits, 0 for an empty tail; None where it is not stored (answers)
    known:          [n, k] bool; False where the student has no such id, whose mass is in the tail
    vocabulary:     V
    """

    ids: torch.Tensor
    logits: torch.Tensor
    tail_logsumexp: torch.Tensor
    tail_mean: torch.Tensor | None
    known: torch.Tensor
    vocabulary: int

    @classmethod
    def of(cls, top: TopLogits, vocabulary: int) -> "TruncatedLogits":
        """A record's logits of all `vocabulary` ids of the teacher, float32 on the CPU."""
        return truncated(
            torch.from_numpy(top.ids),
            torch.from_numpy(top.logits),
            torch.from_numpy(top.tail_logsumexp),
            vocabulary,
            None if top.tail_mean is None else torch.from_numpy(top.tail_mean),
        )

    def top_logits(self, *, mean: bool = True) -> TopLogits:
        """As a record has them, on the CPU. mean: with the tail's mean"""
        return TopLogits(
            ids=self.ids.to(torch.int32).cpu().numpy(),
            logits=self.logits.float().cpu().numpy(),
            tail_logsumexp=self.tail_logsumexp.float().cpu().numpy(),
            tail_mean=self.tail_mean.float().cpu().numpy() if mean and self.tail_mean is not None else None,
        )

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])

    @property
    def whole(self) -> bool:
        """True where nothing is cut: every logit of the vocabulary is stored."""
        return self.k == self.vocabulary and bool(self.known.all())

    @property
    def is_finite(self) -> bool:
        """Whether the logits were, before and after rounding: one that is not leaves something that is not in its row's
        logits or tail_mean. Waits for the device."""
        finite = self.logits.isfinite().all()
        return bool(finite if self.tail_mean is None else finite & self.tail_mean.isfinite().all())

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
        return torch.sigmoid(self._logsumexp(self.known) - self.tail_logsumexp)

    def lacking_mass(self) -> torch.Tensor:
        """[n] share of the teacher's probability that stored logits hold of ids that the student lacks (the tail has
        it)."""
        return torch.exp(
            self._logsumexp(~self.known) - torch.logaddexp(self._logsumexp(self.known), self.tail_logsumexp)
        )

    def _logsumexp(self, chosen: torch.Tensor) -> torch.Tensor:
        """[n] of the stored logits where `chosen` [n, k]."""
        return self.logits.masked_fill(~chosen, -torch.inf).logsumexp(dim=1)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TruncatedLogits":
        """The same with each tensor changed; all of them have the tokens along their first axis."""
        return replace(
            self,
            ids=change(self.ids),
            logits=change(self.logits),
            tail_logsumexp=change(self.tail_logsumexp),
            tail_mean=None if self.tail_mean is None else change(self.tail_mean),
            known=change(self.known),
        )

    def rows(self, chosen: torch.Tensor | slice) -> "TruncatedLogits":
        """The same for some of the tokens."""
        return self.map(lambda tensor: tensor[chosen])

    def to(self, device: torch.device | str) -> "TruncatedLogits":
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def smaller(self, k: int) -> "TruncatedLogits":
        """The first k logits of each token, the dropped ones folded into the tail."""
        if k >= self.k:
            return self
        known, dropped = self.known[:, :k], self.known[:, k:]
        logits = self.logits[:, k:]
        folded = logits.masked_fill(~dropped, -torch.inf).logsumexp(dim=1)
        tail_mean = self.tail_mean
        if tail_mean is not None:
            total = tail_mean * self.n_tail + logits.masked_fill(~dropped, 0).sum(dim=1)
            tail_mean = total / (self.n_tail + dropped.sum(dim=1)).clamp(min=1)
        return replace(
            self,
            ids=self.ids[:, :k],
            logits=self.logits[:, :k],
            tail_logsumexp=torch.logaddexp(self.tail_logsumexp, folded),
            tail_mean=tail_mean,
            known=known,
        )

    def at_temperature(self, temperature: float) -> "TruncatedLogits":
        """The same of logits divided by `temperature`, if all logits of a tail are equal (their mass evenly spread)."""
        size = self.n_tail.clamp(min=1).log()
        return replace(
            self,
            logits=self.logits / temperature,
            tail_logsumexp=(self.tail_logsumexp - size) / temperature + size,
            tail_mean=None if self.tail_mean is None else self.tail_mean / temperature,
        )

    def for_student(self, n_tokens: int) -> "TruncatedLogits":
        """The same for a student with `n_tokens` ids: mass of ids that it lacks goes into the tail."""
        if n_tokens >= self.vocabulary:
            return self
        lacking = self.known & (self.ids >= n_tokens)
        return replace(
            self,
            ids=self.ids.masked_fill(self.ids >= n_tokens, 0),
            tail_logsumexp=torch.logaddexp(self.tail_logsumexp, self._logsumexp(lacking)),
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
    """TruncatedLogits in which the student lacks none of the ids; shapes as in the class, any type of numbers."""
    return TruncatedLogits(
        ids=ids.long(),
        logits=logits.float(),
        tail_logsumexp=tail_logsumexp.float(),
        tail_mean=None if tail_mean is None else tail_mean.float(),
        known=torch.ones_like(ids, dtype=torch.bool),
        vocabulary=vocabulary,
    )


def joined(parts: Sequence[TruncatedLogits]) -> TruncatedLogits:
    """The tokens of all parts, one after the other: at least one part, with the same k and vocabulary, all with a
    tail_mean or none. Raises ValueError."""
    first = parts[0]
    means = [part.tail_mean for part in parts if part.tail_mean is not None]
    if len(means) not in (0, len(parts)):
        raise ValueError(f"{len(means)} of {len(parts)} parts have a tail_mean; expected all or none")
    if any((part.k, part.vocabulary) != (first.k, first.vocabulary) for part in parts):
        raise ValueError(f"parts of different k or vocabulary: {[(part.k, part.vocabulary) for part in parts]}")
    return replace(
        first,
        ids=torch.cat([part.ids for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        tail_logsumexp=torch.cat([part.tail_logsumexp for part in parts]),
        tail_mean=torch.cat(means) if means else None,
        known=torch.cat([part.known for part in parts]),
    )
