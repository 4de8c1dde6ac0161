"""Checked reads: no byte of a shard is used before it is checked.

A Zarr reader fills a missing chunk with zeros, and most codecs decode a flipped bit without an error. So objects are
read whole, compared in size and hash with the shard's index, and only then decoded. The unit that is read is the unit
that is hashed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP, ObjectDigest, checked
from emkd.storage.objects.files import Files


def read_existing(files: Files, name: str) -> bytes:
    """Read a whole object that has to exist. Raises DamagedCacheError if it is missing."""
    data = files.read(name)
    if data is None:
        raise DamagedCacheError(f"{files.where(name)}: missing. {NEXT_STEP}")
    return data


@dataclass(frozen=True, kw_only=True)
class CheckedObjects:
    """The objects in the folder `prefix`. `objects` maps their names in that folder to their digests."""

    files: Files
    prefix: str
    objects: Mapping[str, ObjectDigest]

    def where(self, key: str) -> str:
        """Return the full name of an object, for messages."""
        return self.files.where(f"{self.prefix}/{key}")

    def read(self, key: str) -> bytes:
        """Read a whole object and check it.

        Raises DamagedCacheError, which names the object, if it is missing, truncated, changed, or not in `objects`.
        """
        expected = self.objects.get(key)
        if expected is None:
            raise DamagedCacheError(
                f"{self.where(key)}: needed, but not listed in the shard's index, which does not belong to the shard's "
                f"metadata. {NEXT_STEP}"
            )
        return checked(self.where(key), self.files.read(f"{self.prefix}/{key}"), expected)
