"""SHA-256 of objects, and JSON that vouches for itself.

An envelope is `{"body": ..., "sha256": hex}`, the hash being of the canonical JSON of the body: keys
sorted, no spaces, UTF-8, no NaN. It is the outer form of seal.json and of the metadata in index/<n>.parquet
in every version of the format.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from emkd.errors import DamagedCacheError

NEXT_STEP = (
    "Nothing of it was used. `emkd inspect URI --verify` lists everything that is damaged; restore it from a copy, or "
    "run the same cache-teacher command again with --repair: it makes only the damaged shards anew"
)


@dataclass(frozen=True, kw_only=True)
class ObjectDigest:
    """Size and hashes (hex) of an object.

    xxh128: XXH3 of 128 bits, of the objects of shards; None of all others, and in format version 1. It is as good
        against accidents as SHA-256 and much faster, so that what is read again and again is compared by it; `verify`
        compares both.
    """

    n_bytes: int
    sha256: str
    xxh128: str | None = None

    @classmethod
    def of(cls, data: bytes) -> "ObjectDigest":
        return cls(n_bytes=len(data), sha256=sha256_hex(data))

    @classmethod
    def of_array(cls, data: bytes) -> "ObjectDigest":
        """With both hashes."""
        return cls(n_bytes=len(data), sha256=sha256_hex(data), xxh128=xxhash.xxh3_128_hexdigest(data))

    @classmethod
    def from_json(cls, value: Any) -> "ObjectDigest":
        """ValueError where `value` is not {"n_bytes": int, "sha256": str}, with or without "xxh128": str."""
        if not isinstance(value, dict) or value.keys() - {"xxh128"} != {"n_bytes", "sha256"}:
            raise ValueError(f"expected the size and hash of an object, got {value!r:.80}")
        xxh128 = str(value["xxh128"]) if "xxh128" in value else None
        return cls(n_bytes=int(value["n_bytes"]), sha256=str(value["sha256"]), xxh128=xxh128)

    def to_json(self) -> dict[str, Any]:
        found = {"n_bytes": self.n_bytes, "sha256": self.sha256}
        return found if self.xxh128 is None else found | {"xxh128": self.xxh128}


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value. ValueError for NaN and infinities, TypeError for what JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def describe_damage(data: bytes | None, expected: ObjectDigest) -> str | None:
    """What is wrong with the bytes of an object (None: there is no such object); None where nothing is. By all that is
    known of it."""
    damage = _damage(data, expected)
    if damage is None and data is not None and expected.xxh128 is not None and sha256_hex(data) != expected.sha256:
        return "its two hashes contradict each other: the index of its shard was written wrongly"
    return damage


def _damage(data: bytes | None, expected: ObjectDigest) -> str | None:
    """The same by the fastest hash that there is."""
    if data is None:
        return f"missing, expected {expected.n_bytes:,} bytes"
    if len(data) != expected.n_bytes:
        return f"{len(data):,} bytes, expected {expected.n_bytes:,}"
    name, known = ("SHA-256", expected.sha256) if expected.xxh128 is None else ("XXH3-128", expected.xxh128)
    found = sha256_hex(data) if expected.xxh128 is None else xxhash.xxh3_128_hexdigest(data)
    return None if found == known else f"content changed: {name} {found[:16]}..., expected {known[:16]}..."


def checked(where: str, data: bytes | None, expected: ObjectDigest) -> bytes:
    """The bytes of the object at `where`, if they are the expected ones; DamagedCacheError if not."""
    damage = _damage(data, expected)
    if damage is not None or data is None:
        raise DamagedCacheError(f"{where}: {damage}. {NEXT_STEP}")
    return data


def seal_envelope(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"body": dict(body), "sha256": sha256_hex(canonical_json(body))}


def open_envelope(where: str, data: bytes) -> dict[str, Any]:
    """The body of the envelope read at `where`; DamagedCacheError where it does not vouch for itself."""
    try:
        envelope = json.loads(data)
        body, stated = envelope["body"], envelope["sha256"]
        intact = set(envelope) == {"body", "sha256"} and sha256_hex(canonical_json(body)) == stated
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCacheError(f"{where}: not what was written ({error}). {NEXT_STEP}") from error
    if not intact or not isinstance(body, dict):
        raise DamagedCacheError(f"{where}: content changed, it does not match its own hash. {NEXT_STEP}")
    return body
