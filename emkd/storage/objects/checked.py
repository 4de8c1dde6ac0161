"""Reading: no byte of a shard is used that was not checked.

A Zarr reader takes a missing chunk for zeros, and most codecs take a flipped bit for a number. Here whole objects are
read, compared in size and hash with what the shard's index says of them, and only then looked into. The unit that is
read is the unit that is hashed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP, ObjectDigest, checked
from emkd.storage.objects.files import Files


@dataclass(frozen=True, kw_only=True)
class CheckedObjects:
    """The objects in one folder that `objects` vouches for, by their names in it."""

    files: Files
    prefix: str
    objects: Mapping[str, ObjectDigest]

    def where(self, key: str) -> str:
        """The full name of an object, for messages."""
        return self.files.where(f"{self.prefix}/{key}")

    def read(self, key: str) -> bytes:
        """A whole object. DamagedCacheError, naming it, where it is missing, cut short, changed, or in no table."""
        expected = self.objects.get(key)
        if expected is None:
            raise DamagedCacheError(
                f"{self.where(key)}: asked for, but in no table of objects: the shard's metadata and its index do not "
                f"belong together. {NEXT_STEP}"
            )
        return checked(self.where(key), self.files.read(f"{self.prefix}/{key}"), expected)
