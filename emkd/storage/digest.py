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

from emkd.errors import DamagedCacheError

NEXT_STEP = (
    "Nothing of it was used. `emkd inspect URI --verify` lists everything that is damaged; restore it from a copy, or "
    "run the same cache-teacher command again with --repair: it makes only the damaged shards anew"
)


@dataclass(frozen=True, kw_only=True)
class ObjectDigest:
    """Size and SHA-256 (hex) of an object."""

    n_bytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "ObjectDigest":
        return cls(n_bytes=len(data), sha256=sha256_hex(data))

    @classmethod
    def from_json(cls, value: Any) -> "ObjectDigest":
        """ValueError where `value` is not {"n_bytes": int, "sha256": str}."""
        if not isinstance(value, dict) or set(value) != {"n_bytes", "sha256"}:
            raise ValueError(f"expected the size and hash of an object, got {value!r:.80}")
        return cls(n_bytes=int(value["n_bytes"]), sha256=str(value["sha256"]))

    def to_json(self) -> dict[str, Any]:
        return {"n_bytes": self.n_bytes, "sha256": self.sha256}


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value. ValueError for NaN and infinities, TypeError for what JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def describe_damage(data: bytes | None, expected: ObjectDigest) -> str | None:
    """What is wrong with the bytes of an object (None: there is no such object); None where nothing is."""
    if data is None:
        return f"missing, expected {expected.n_bytes:,} bytes"
    if len(data) != expected.n_bytes:
        return f"{len(data):,} bytes, expected {expected.n_bytes:,}"
    found = sha256_hex(data)
    if found != expected.sha256:
        return f"content changed: SHA-256 {found[:16]}..., expected {expected.sha256[:16]}..."
    return None


def checked(where: str, data: bytes | None, expected: ObjectDigest) -> bytes:
    """The bytes of the object at `where`, if they are the expected ones; DamagedCacheError if not."""
    damage = describe_damage(data, expected)
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
