"""Codes of hidden states on a device: the torch side of `emkd.storage.basis`.

    hidden states [n, d] --encode--> codes [n, r] --logits--> t^ [n, V], --hidden--> hidden states

Shape legend: n tokens, d hidden size, r columns, V ids of the tokenizer, u chosen ids
"""

import math

import torch

from emkd.errors import SampleError
from emkd.storage.basis import Basis
from emkd.vlm.after_head import AfterHead
from emkd.vlm.truncated import TruncatedLogits

# Reasons for skipping a row (docs/data.md).
OUT_OF_RANGE = "codes-out-of-range"
NOT_FINITE = "not-finite"
MOST = 32767  # the largest int16
# Rows of the head that are multiplied at a time.
IDS = 1 << 15


class Codes:
    """A basis on one device.

    On a CPU the head is kept in float32, which takes twice its memory in the file and saves a conversion at each use.
    """

    def __init__(self, basis: Basis, device: torch.device | str) -> None:
        def tensor(array: object) -> torch.Tensor:
            return torch.as_tensor(array, device=device)

        self.step, self.after = basis.step, AfterHead(cap=basis.cap)
        self.mean, self.projection = tensor(basis.mean), tensor(basis.projection)
        self.reconstruction, self.offset = tensor(basis.reconstruction), tensor(basis.offset)
        self.head = tensor(basis.head)
        self._over: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
        if self.head.device.type == "cpu":
            self.head = self.head.float()

    def coefficients(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the columns [n, r] of hidden states [n, d], in float32; codes are these in steps, rounded.

        They are the transpose of a contiguous [r, n], as storage keeps them: to transpose 2,916 x 1,500 codes takes as
        long as compressing them.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return (self.projection.T @ (hidden.float() - self.mean).T).T

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return codes [n, r] int16 of hidden states [n, d].

        Raises SampleError if a state is not finite, or if a number does not fit: the state lies far outside of those
        that the basis was made from.
        """
        numbers = (self.coefficients(hidden) / self.step).round_()
        largest = float(numbers.abs().amax()) if numbers.numel() else 0.0
        if not math.isfinite(largest):
            raise SampleError(NOT_FINITE, "hidden states are not finite, so they have no codes")
        if largest > MOST:
            raise SampleError(
                OUT_OF_RANGE,
                f"a hidden state needs a code of {largest:.3g}, at most {MOST} fits; use a larger --logit-error, or "
                "none",
            )
        return numbers.to(torch.int16)

    def logits(self, codes: torch.Tensor, ids: torch.Tensor | slice | None = None) -> torch.Tensor:
        """Return float32 logits [n, V] of codes [n, r], or [n, u] of chosen ids."""
        head, offset = (self.head, self.offset) if ids is None else (self.head[ids], self.offset[ids])
        numbers = codes.float() * self.step
        out = numbers.new_empty(len(codes), len(offset))
        with torch.autocast(codes.device.type, enabled=False):
            for start in range(0, len(offset), IDS):  # a whole head in float32 would take twice its memory again
                some = slice(start, start + IDS)
                out[:, some] = torch.addmm(offset[some], numbers, head[some].float().T)
        return self.after(out)

    def over(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (mean [r + 1], centred [u, r + 1], covariance [r + 1, r + 1]) of logits over chosen ids [u].

        They are those of one step of each column, with the offset as the last column: the logits of a token are the
        columns times its codes and 1. Kept for the next call with the same ids.

        Raises ValueError for capped logits, which are not such a product.
        """
        if self.after.cap is not None:
            raise ValueError("logits with a softcap are no linear function of codes; compute them with `logits`")
        if self._over is None or self._over[0] is not ids:
            columns = torch.cat([self.head[ids].float() * self.step, self.offset[ids][:, None]], dim=1)
            mean = columns.mean(dim=0)
            centred = columns - mean
            self._over = ids, (mean, centred, centred.T @ centred / len(ids))
        return self._over[1]

    def hidden(self, codes: torch.Tensor) -> torch.Tensor:
        """Return float32 hidden states [n, d] of codes [n, r]."""
        with torch.autocast(codes.device.type, enabled=False):
            return torch.addmm(self.mean, codes.float() * self.step, self.reconstruction.T)


def dense_logits(teacher: TruncatedLogits, codes: Codes) -> torch.Tensor:
    """Return all logits of the teacher, float32 [n, V], up to a constant of each token: t^ read from codes.

    The stored logits are as stored. The others are read from codes, and shifted so that their logsumexp is the stored
    one of the tail: the tail keeps its mass, and codes give it its shape.

    Raises ValueError if the tokens have no codes.
    """
    if teacher.codes is None:
        raise ValueError("dense logits need codes, and these tokens have none")
    logits = codes.logits(teacher.codes, slice(teacher.vocabulary))
    known = teacher.known
    nothing = torch.zeros_like(teacher.logits)
    logits.scatter_reduce_(
        1, teacher.ids, nothing.masked_fill(known, -torch.inf).masked_fill(~known, torch.inf), "amin"
    )
    shift = teacher.tail_logsumexp - logits.logsumexp(dim=1)
    logits += shift.masked_fill(teacher.n_tail == 0, 0)[:, None]
    return logits.scatter_reduce_(1, teacher.ids, teacher.logits.masked_fill(~known, -torch.inf), "amax")
