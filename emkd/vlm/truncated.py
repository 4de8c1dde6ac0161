"""The teacher's distributions, cut to their k largest logits, as tensors: capture makes them, losses compare with them.

The torch twin of `emkd.storage.record.TopLogits`, with two more facts that a loss needs: the size of the vocabulary,
and which of the ids the student has.

Shape legend: n tokens, k stored logits, V ids that teacher and student share (those that are not stored are the tail)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from emkd.storage.record import TopLogits


@dataclass(frozen=True, kw_only=True)
class TruncatedLogits:
    """t̂: the k largest logits of n tokens, and what is known of their tails.

    ids:            [n, k] int64, by descending logit, equal logits by ascending id; 0 for ids that the student lacks
    logits:         [n, k] float32
    tail_logsumexp: [n] float32 of the V - k logits that are not stored; -inf for an empty tail
    tail_mean:      [n] float32 mean of those logits, 0 for an empty tail; None if it is not stored (answers)
    known:          [n, k] bool; False for ids that the student lacks, whose mass is in the tail
    vocabulary:     V
    codes:          [n, r] int16 or int8 of the hidden states (see `emkd.vlm.codes`); None if they are not stored
    """

    ids: torch.Tensor
    logits: torch.Tensor
    tail_logsumexp: torch.Tensor
    tail_mean: torch.Tensor | None
    known: torch.Tensor
    vocabulary: int
    codes: torch.Tensor | None = None

    @classmethod
    def of(cls, top: TopLogits, vocabulary: int) -> "TruncatedLogits":
        """Return a record's logits as float32 tensors on the CPU. vocabulary: V of the teacher"""
        return truncated(
            torch.from_numpy(top.ids),
            torch.from_numpy(top.logits),
            torch.from_numpy(top.tail_logsumexp),
            vocabulary,
            None if top.tail_mean is None else torch.from_numpy(top.tail_mean),
            None if top.codes is None else torch.from_numpy(top.codes),
        )

    def top_logits(self, *, mean: bool = True) -> TopLogits:
        """Return them as a record has them, on the CPU. mean: whether to keep tail_mean"""
        return TopLogits(
            ids=self.ids.to(torch.int32).cpu().numpy(),
            logits=self.logits.float().cpu().numpy(),
            tail_logsumexp=self.tail_logsumexp.float().cpu().numpy(),
            tail_mean=self.tail_mean.float().cpu().numpy() if mean and self.tail_mean is not None else None,
            codes=None if self.codes is None else self.codes.cpu().numpy(),
        )

    @property
    def k(self) -> int:
        """Stored logits of a token."""
        return int(self.ids.shape[1])

    @property
    def whole(self) -> bool:
        """Whether nothing is cut: every logit of the vocabulary is stored, and the student has every id."""
        return self.k == self.vocabulary and bool(self.known.all())

    @property
    def is_finite(self) -> bool:
        """Whether all V logits of all tokens were finite, before and after rounding. Waits for the device.

        An infinite or NaN logit always shows in its token's stored logits or tail_mean. Without tail_mean, only the
        stored logits are checked.
        """
        finite = self.logits.isfinite().all()
        return bool(finite if self.tail_mean is None else finite & self.tail_mean.isfinite().all())

    @property
    def n_tail(self) -> torch.Tensor:
        """[n] number of ids in the tail."""
        return self.vocabulary - self.known.sum(dim=1)

    def stored_mask(self) -> torch.Tensor:
        """Return [n, V] bool, True at the stored ids that the student has."""
        counts = torch.zeros(len(self.ids), self.vocabulary, dtype=torch.uint8, device=self.ids.device)
        return counts.scatter_add_(1, self.ids, self.known.to(torch.uint8)) > 0

    def retained_mass(self) -> torch.Tensor:
        """Return [n], the share of the teacher's probability that the stored logits of the student's ids hold."""
        return torch.sigmoid(self._logsumexp(self.known) - self.tail_logsumexp)

    def lacking_mass(self) -> torch.Tensor:
        """Return [n], the share of the teacher's probability that stored logits give to ids that the student lacks.

        The tail contains this mass.
        """
        return torch.exp(
            self._logsumexp(~self.known) - torch.logaddexp(self._logsumexp(self.known), self.tail_logsumexp)
        )

    def logsumexp(self) -> torch.Tensor:
        """Return [n], the logsumexp of all logits of the teacher."""
        return torch.logaddexp(self._logsumexp(self.known), self.tail_logsumexp)

    def _logsumexp(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return [n], the logsumexp of the stored logits that `chosen` [n, k] selects."""
        return self.logits.masked_fill(~chosen, -torch.inf).logsumexp(dim=1)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TruncatedLogits":
        """Return a copy with `change` applied to each tensor; the first axis of every tensor is the tokens."""
        return replace(
            self,
            ids=change(self.ids),
            logits=change(self.logits),
            tail_logsumexp=change(self.tail_logsumexp),
            tail_mean=None if self.tail_mean is None else change(self.tail_mean),
            known=change(self.known),
            codes=None if self.codes is None else change(self.codes),
        )

    def rows(self, chosen: torch.Tensor | slice) -> "TruncatedLogits":
        """Return some of the tokens. chosen: a slice, indices [m] or a mask [n]"""
        return self.map(lambda tensor: tensor[chosen])

    def to(self, device: torch.device | str) -> "TruncatedLogits":
        """Return a copy on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def smaller(self, k: int) -> "TruncatedLogits":
        """Return the first k logits of each token, with the other stored logits moved into the tail."""
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

    def shifted(self, level: torch.Tensor) -> "TruncatedLogits":
        """Return all logits less `level` [n]; the codes, which are not logits, stay."""
        return replace(
            self,
            logits=self.logits - level[:, None],
            tail_logsumexp=self.tail_logsumexp - level,
            tail_mean=None if self.tail_mean is None else self.tail_mean - level,
        )

    def at_temperature(self, temperature: float) -> "TruncatedLogits":
        """Return the logits divided by `temperature`, assuming that a tail's mass is spread evenly over its ids."""
        size = self.n_tail.clamp(min=1).log()
        return replace(
            self,
            logits=self.logits / temperature,
            tail_logsumexp=(self.tail_logsumexp - size) / temperature + size,
            tail_mean=None if self.tail_mean is None else self.tail_mean / temperature,
        )

    def for_student(self, n_tokens: int) -> "TruncatedLogits":
        """Return the logits for a student with the ids 0 to n_tokens - 1: the mass of larger ids moves to the tail."""
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
    codes: torch.Tensor | None = None,
) -> TruncatedLogits:
    """Return TruncatedLogits in which the student lacks no id; shapes as in the class, any dtype."""
    return TruncatedLogits(
        ids=ids.long(),
        logits=logits.float(),
        tail_logsumexp=tail_logsumexp.float(),
        tail_mean=None if tail_mean is None else tail_mean.float(),
        known=torch.ones_like(ids, dtype=torch.bool),
        vocabulary=vocabulary,
        codes=codes,
    )


def joined(parts: Sequence[TruncatedLogits]) -> TruncatedLogits:
    """Return the tokens of all parts (at least one), one part after the other.

    Raises ValueError if parts differ in k or vocabulary, or if only some of them have a tail_mean or codes.
    """
    first = parts[0]
    means = [part.tail_mean for part in parts if part.tail_mean is not None]
    codes = [part.codes for part in parts if part.codes is not None]
    for name, found in (("a tail_mean", means), ("codes", codes)):
        if len(found) not in (0, len(parts)):
            raise ValueError(f"{len(found)} of {len(parts)} parts have {name}; expected all or none")
    if any((part.k, part.vocabulary) != (first.k, first.vocabulary) for part in parts):
        raise ValueError(f"parts of different k or vocabulary: {[(part.k, part.vocabulary) for part in parts]}")
    return replace(
        first,
        ids=torch.cat([part.ids for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        tail_logsumexp=torch.cat([part.tail_logsumexp for part in parts]),
        tail_mean=torch.cat(means) if means else None,
        known=torch.cat([part.known for part in parts]),
        codes=torch.cat(codes) if codes else None,
    )
