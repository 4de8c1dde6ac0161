"""What a manifest says of codes: integers that stand for hidden states (docs/method.md, "Codes").

A hidden state h of width d becomes r integers q = round((h - mean) P / step), one for each column of P, and a logit is
read back as step * q U^T + offset. mean, P and U make the basis, an object of its own (`storage/basis.py`), which the
preflight makes from a few rows and the manifest freezes: every shard and every extension has the same.
"""

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from emkd.storage.manifest.plan import Positive, Stored
from emkd.storage.objects.sizes import MOST_COLUMNS

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CodesAsked(Stored):
    """What the user asked for; a run that resumes a cache must ask for the same.

    logit_error: predicted root mean square error of a logit; None lets `token_bytes` decide
    token_bytes: bytes of ids, logits, tails and codes of a vision token that must not be exceeded; None for no limit
    """

    logit_error: Above0 | None = None
    token_bytes: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> "CodesAsked":
        if self.logit_error is None and self.token_bytes is None:
            raise ValueError("codes need a logit_error, a number of token_bytes, or both")
        return self


class BasisIdentity(Stored):
    """The basis that the preflight made, and what follows from it.

    sha256:      of the object
    width:       d, the width of a hidden state
    groups:      numbers of columns that are compressed together, in the order of the columns (see `arrays/frames.py`)
    step:        of the integers, in the unit of the columns
    logit_error: predicted root mean square error of a logit; an upper bound if there is a cap
    cap:         of the softcap behind the LM head. None, and no field of the file, if the model has none; a version of
                 emkd that does not know it refuses the file, instead of reading other logits
    """

    sha256: str
    width: Positive
    groups: tuple[Positive, ...]
    step: Above0
    logit_error: Above0
    cap: Above0 | None = None

    @model_serializer(mode="wrap")
    def _without_no_cap(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name != "cap" or value is not None}

    @model_validator(mode="after")
    def _check_columns(self) -> "BasisIdentity":
        if not self.groups or self.n_columns > MOST_COLUMNS:
            raise ValueError(f"{self.n_columns} columns in {len(self.groups)} groups; expected 1 to {MOST_COLUMNS:,}")
        return self

    @property
    def n_columns(self) -> int:
        """r, the integers of a token."""
        return sum(self.groups)
