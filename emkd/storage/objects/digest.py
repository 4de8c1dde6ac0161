"""Hashes of objects, and JSON that contains its own hash.

An envelope is `{"body": ..., "sha256": hex}`; the hash is that of the canonical JSON of the body: keys sorted, no
spaces, UTF-8, no NaN. Every version of the format uses it for seal.json, for the plan.json of extensions and for the
metadata in index/<n>.parquet.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from emkd.errors import DamagedCacheError

NEXT_STEP = (
    "None of its data was used. `emkd inspect URI --verify` lists everything that is damaged; restore it from a copy, "
    "or run the same cache-teacher command again with --repair: it rewrites only the damaged shards"
)


@dataclass(frozen=True, kw_only=True)
class ObjectDigest:
    """Size and hashes (hex) of an object.

    xxh128: 128-bit XXH3 of an object of a shard; None for every other object, and in format version 1. It finds
            accidental changes as well as SHA-256 does and is much faster, so repeated reads compare it alone; `verify`
            compares both.
    """

    n_bytes: int
    sha256: str
    xxh128: str | None = None

    @classmethod
    def of(cls, data: bytes) -> "ObjectDigest":
        """Return the size and SHA-256 of `data`."""
        return cls(n_bytes=len(data), sha256=sha256_hex(data))

    @classmethod
    def of_array(cls, data: bytes) -> "ObjectDigest":
        """Return the size and both hashes of `data`."""
        return cls(n_bytes=len(data), sha256=sha256_hex(data), xxh128=xxhash.xxh3_128_hexdigest(data))

    @classmethod
    def from_json(cls, value: Any) -> "ObjectDigest":
        """Parse {"n_bytes": int, "sha256": str}, with or without "xxh128": str. Raises ValueError for other values."""
        if not isinstance(value, dict) or value.keys() - {"xxh128"} != {"n_bytes", "sha256"}:
            raise ValueError(f"expected the size and hash of an object, got {value!r:.80}")
        xxh128 = str(value["xxh128"]) if "xxh128" in value else None
        if type(value["n_bytes"]) is not int:
            raise ValueError(f"expected a size in bytes, got {value['n_bytes']!r:.80}")
        return cls(n_bytes=int(value["n_bytes"]), sha256=str(value["sha256"]), xxh128=xxh128)

    def to_json(self) -> dict[str, Any]:
        """Return the value that from_json parses."""
        found = {"n_bytes": self.n_bytes, "sha256": self.sha256}
        return found if self.xxh128 is None else found | {"xxh128": self.xxh128}


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON of a value: equal values give equal bytes.

    Raises ValueError for NaN and infinities, and TypeError for types that JSON lacks.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def describe_damage(data: bytes | None, expected: ObjectDigest) -> str | None:
    """Compare an object with its size and all its hashes: a description of the damage, or None if it is intact.

    data: the bytes of the object, None if it does not exist
    """
    damage = _damage(data, expected)
    if damage is None and data is not None and expected.xxh128 is not None and sha256_hex(data) != expected.sha256:
        return "its two hashes contradict each other: the index of its shard is wrong"
    return damage


def _damage(data: bytes | None, expected: ObjectDigest) -> str | None:
    """As describe_damage, with only the fastest hash that is known."""
    if data is None:
        return f"missing, expected {expected.n_bytes:,} bytes"
    if len(data) != expected.n_bytes:
        return f"{len(data):,} bytes, expected {expected.n_bytes:,}"
    name, known = ("SHA-256", expected.sha256) if expected.xxh128 is None else ("XXH3-128", expected.xxh128)
    found = sha256_hex(data) if expected.xxh128 is None else xxhash.xxh3_128_hexdigest(data)
    return None if found == known else f"content changed: {name} {found[:16]}..., expected {known[:16]}..."


def checked(where: str, data: bytes | None, expected: ObjectDigest) -> bytes:
    """Return `data`, the bytes of the object at `where`. Raises DamagedCacheError if they are not as expected."""
    damage = _damage(data, expected)
    if damage is not None or data is None:
        raise DamagedCacheError(f"{where}: {damage}. {NEXT_STEP}")
    return data


def seal_envelope(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the envelope of `body`."""
    return {"body": dict(body), "sha256": sha256_hex(canonical_json(body))}


def open_envelope(where: str, data: bytes) -> dict[str, Any]:
    """Return the body of the envelope read at `where`. Raises DamagedCacheError if it does not match its own hash."""
    try:
        envelope = json.loads(data)
        body, stated = envelope["body"], envelope["sha256"]
        intact = set(envelope) == {"body", "sha256"} and sha256_hex(canonical_json(body)) == stated
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCacheError(f"{where}: not as it was written ({error}). {NEXT_STEP}") from error
    if not intact or not isinstance(body, dict):
        raise DamagedCacheError(f"{where}: content changed, it does not match its own hash. {NEXT_STEP}")
    return body
