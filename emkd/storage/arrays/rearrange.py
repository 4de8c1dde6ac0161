"""Integers rearranged so that they compress well, and back. Pure functions on NumPy arrays, exact both ways.

    ids       [n, k]     the low 16 bits, and what is above them: the low ones hardly compress, the others nearly vanish
    logits    [n, k]     keys: unsigned integers in the order of the logits. They descend within a token, so that the
                         differences from rank to rank are small: [k, n], rank by rank, the first rank as it is
    affinity  [Nt, L]    differences from vision token to vision token, which are neighbours in the picture; every
                         RESTART-th token is as it is, so that undoing them takes RESTART steps whatever the length

Shape legend: n tokens, k stored logits, Nt vision tokens and L text tokens of one sample
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESTART = 32
LOW_BITS = 16

_UNSIGNED: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def split_ids(ids: NDArray[np.int32]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """(low, high) of ids below 2**24, of any shape: id = low + 65,536 high."""
    return (ids & 0xFFFF).astype(np.uint16), (ids >> LOW_BITS).astype(np.uint8)


def join_ids(low: NDArray[np.uint16], high: NDArray[np.uint8] | None) -> NDArray[np.int32]:
    """The inverse of split_ids; without `high` there is nothing above the low bits."""
    if high is None:
        return low.astype(np.int32)
    ids = high.astype(np.int32)
    ids <<= LOW_BITS
    ids |= low
    return ids


def key_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Type of the keys of numbers that are stored as this type."""
    return _UNSIGNED[stored.itemsize]


def to_keys(stored: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers of the same width, ordered as the numbers that were stored (bfloat16 as its bits, any IEEE
    type, int16)."""
    bits = stored.view(key_dtype(stored.dtype))
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    if stored.dtype.kind == "i":
        return bits ^ sign
    # Positive numbers go above all negative ones, and those descend with their bits.
    return bits ^ (_sign_spread(bits) | sign)


def from_keys(keys: NDArray[Any], stored: np.dtype[Any]) -> NDArray[Any]:
    """The inverse of to_keys."""
    sign = keys.dtype.type(1 << (8 * keys.itemsize - 1))
    mask = sign if stored.kind == "i" else ~_sign_spread(keys) | sign
    found: NDArray[Any] = (keys ^ mask).view(stored)
    return found


def _sign_spread(bits: NDArray[Any]) -> NDArray[Any]:
    """All bits of a number are its uppermost one."""
    signed = bits.view(f"i{bits.itemsize}")
    return (signed >> (8 * bits.itemsize - 1)).view(bits.dtype)


def by_rank(keys: NDArray[Any]) -> NDArray[Any]:
    """[k, n] from keys [n, k]: the first rank, then how much each falls below the one before it (modulo the type)."""
    # Not ascontiguousarray, which is the very memory of `keys` where there is one token or one rank.
    ranks = np.array(keys.T, order="C")
    ranks[1:] = ranks[:-1] - ranks[1:]
    return ranks


def from_ranks(ranks: NDArray[Any]) -> NDArray[Any]:
    """Keys [k, n] from the output of by_rank, rank by rank still."""
    keys = np.empty_like(ranks)
    keys[:1] = ranks[:1]
    for rank in range(1, len(ranks)):
        np.subtract(keys[rank - 1], ranks[rank], out=keys[rank])
    return keys


def along_tokens(affinity: NDArray[np.int8]) -> NDArray[np.int8]:
    """Differences (modulo 256) along the first axis of [Nt, L]."""
    found = affinity.copy()
    found[1:] -= affinity[:-1]
    found[::RESTART] = affinity[::RESTART]
    return found


def from_tokens(differences: NDArray[np.int8]) -> NDArray[np.int8]:
    """The inverse of along_tokens."""
    found = differences.copy()
    whole = len(found) // RESTART * RESTART
    runs = found[:whole].reshape(whole // RESTART, RESTART, found.shape[1])
    rest = found[whole:]
    for step in range(1, RESTART):
        runs[:, step] += runs[:, step - 1]
    for step in range(1, len(rest)):
        rest[step] += rest[step - 1]
    return found
