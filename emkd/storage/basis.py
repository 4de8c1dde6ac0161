"""The basis of a cache's codes: what turns hidden states into integers, and integers into logits.

    q = round((h - mean) projection / step)                codes of a hidden state h
    t = step * q head^T + offset                           its logits; cap * tanh(t / cap) if the model has a softcap
    h = mean + step * q reconstruction^T                   the hidden state, for affinities

One object, written once before the manifest, which has its hash. docs/method.md has the formulas.

Shape legend: d width of hidden states, r columns, V ids of the tokenizer
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from emkd.errors import DamagedCacheError
from emkd.storage.manifest.codes import BasisIdentity
from emkd.storage.objects.checked import read_existing
from emkd.storage.objects.digest import NEXT_STEP, sha256_hex
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import basis_name


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The arrays of a basis.

    mean:           [d] float32, of the preflight's hidden states
    projection:     [d, r] float32, columns by descending variance
    reconstruction: [d, r] float32
    head:           [V, r] float16, the rows of the LM head times `reconstruction`, and times the scale of its logits
    offset:         [V] float32, the logits of `mean`
    groups:         as in `BasisIdentity`
    step:           of the integers
    logit_error:    predicted root mean square error of a logit, an upper bound if there is a cap
    cap:            of the softcap that logits go through; None if there is none
    """

    mean: NDArray[np.float32]
    projection: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    head: NDArray[np.float16]
    offset: NDArray[np.float32]
    groups: tuple[int, ...]
    step: float
    logit_error: float
    cap: float | None = None

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays in bytes."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def hidden(self, codes: NDArray[np.signedinteger]) -> NDArray[np.float32]:
        """Return the hidden states [n, d] of codes [n, r]."""
        return self.mean + np.float32(self.step) * (codes.astype(np.float32) @ self.reconstruction.T)

    def affinity(self, text: NDArray[np.signedinteger], vision: NDArray[np.signedinteger]) -> NDArray[np.float32]:
        """Return the cosines [L, Nt] of the hidden states of codes [L, r] and [Nt, r]."""
        return _normalized(self.hidden(text)) @ _normalized(self.hidden(vision)).T

    def to_bytes(self) -> bytes:
        """Return the object, a pure function of the fields. Its numbers are arrays, too, so that it says all itself."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        numbers = np.array([self.step, self.logit_error], np.float64)
        arrays |= {"groups": np.array(self.groups, np.int64), "step_and_logit_error": numbers}
        if self.cap is not None:
            arrays["cap"] = np.array(self.cap, np.float64)
        return save(arrays)

    def identity(self, data: bytes) -> BasisIdentity:
        """Return what a manifest says of this basis. data: the output of `to_bytes`"""
        return BasisIdentity(
            sha256=sha256_hex(data),
            width=len(self.mean),
            groups=self.groups,
            step=self.step,
            logit_error=self.logit_error,
            cap=self.cap,
        )

    @classmethod
    def from_bytes(cls, where: str, data: bytes, identity: BasisIdentity) -> "Basis":
        """Parse the object at `where`.

        Raises DamagedCacheError if it does not have the hash in the manifest or not the arrays of a basis.
        """
        if sha256_hex(data) != identity.sha256:
            raise DamagedCacheError(f"{where}: content changed, it is not the basis of the manifest. {RESTORE}")
        try:
            basis = _parse(data)
        except _NOT_A_BASIS as error:
            raise DamagedCacheError(f"{where}: not the basis of codes ({error}). {NEXT_STEP}") from error
        if basis.identity(data) != identity:
            raise DamagedCacheError(f"{where}: not the basis that the manifest describes. {NEXT_STEP}")
        return basis


def identify(data: bytes) -> BasisIdentity | None:
    """Return what a manifest says of this object, None if it is not a basis."""
    try:
        return _parse(data).identity(data)
    except _NOT_A_BASIS:
        return None


def _parse(data: bytes) -> Basis:
    found = load(data)
    step, logit_error = found["step_and_logit_error"].tolist()
    basis = Basis(
        **{name: found[name] for name in _ARRAYS},
        groups=tuple(found["groups"].tolist()),
        step=step,
        logit_error=logit_error,
        cap=float(found["cap"]) if "cap" in found else None,
    )
    dtypes = {name: array.dtype.name for name, array in found.items()}
    if dtypes != {name: _DTYPES[name] for name in _DTYPES if name != "cap" or "cap" in found}:
        raise ValueError(f"its arrays have types {dtypes}")
    (width,), (n_ids,), r = basis.mean.shape, basis.offset.shape, sum(basis.groups)
    shapes = [basis.projection.shape, basis.reconstruction.shape, basis.head.shape]
    if shapes != [(width, r), (width, r), (n_ids, r)]:
        raise ValueError(f"its arrays have shapes {shapes}")
    return basis


_NOT_A_BASIS = (SafetensorError, KeyError, ValueError, IndexError, TypeError, AttributeError, OverflowError)
_NUMBERS = ("groups", "step", "logit_error", "cap")
_ARRAYS = tuple(field.name for field in fields(Basis) if field.name not in _NUMBERS)
_DTYPES = {
    **dict.fromkeys(("mean", "projection", "reconstruction", "offset"), "float32"),
    "head": "float16",
    "groups": "int64",
    "step_and_logit_error": "float64",
    "cap": "float64",
}
RESTORE = (
    "Codes cannot be read without it, and it cannot be computed again: restore the file from a copy of the cache, or "
    "make the cache again"
)


def _normalized(states: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    return states / np.maximum(norms, np.float32(1e-12))


def read_basis(files: Files, identity: BasisIdentity) -> Basis:
    """Read and check the basis of a manifest. Raises DamagedCacheError if it is missing or changed."""
    name = basis_name(identity.sha256)
    return Basis.from_bytes(files.where(name), read_existing(files, name), identity)
