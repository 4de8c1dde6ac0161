"""What of a cache cannot be read, as {name, what}; a cache that can be is opened on the way.

Plain inspection looks for damage only where opening meets some, and then without reading the shards' arrays,
so that it stays instant; with `arrays` everything is read.
"""

from pathlib import Path
from typing import Any

from emkd.errors import DamagedCacheError
from emkd.storage.cache import Cache, verify
from emkd.storage.lifecycle.seal import read_seal
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.open import open_files


def open_for_inspection(uri: str | Path) -> Cache:
    """Sealed or not, with one decoded shard at a time in memory. Errors as Cache.open."""
    return Cache.open(uri, partial=True, window=1)


def open_or_list_damage(uri: str | Path, *, arrays: bool) -> tuple[Cache | None, list[dict[str, str]]]:
    """The cache, None where what describes it is damaged, and all that is damaged as {name, what}.

    It is opened first: shards that a running job commits meanwhile are then verified though not reported, and
    never the other way round. Where opening fails and no damage is found, the job has mended or replaced what
    was read in between, and opening again says how things are now. Raises InputNotFoundError,
    CacheVersionError.
    """
    try:
        cache = open_for_inspection(uri)
    except DamagedCacheError:
        found = _damages(uri, arrays)
        return (None, found) if found else (open_for_inspection(uri), [])
    return cache, _damages(uri, arrays) if arrays else []


def damage_report(uri: str | Path, damaged: list[dict[str, str]], *, verified: bool) -> dict[str, Any]:
    """The report in place of a summary. `sealed` is None where the seal itself is damaged."""
    return {"uri": str(uri), "sealed": _sealed(uri), "damaged": damaged, "verified": verified}


def _sealed(uri: str | Path) -> bool | None:
    try:
        return read_seal(open_files(uri)) is not None
    except DamagedCacheError:
        return None


def _damages(uri: str | Path, arrays: bool) -> list[dict[str, str]]:
    """In the order of `verify`, without what its texts repeat: the object's name and the next step."""
    where = open_files(uri).where
    return [
        {"name": found.name, "what": found.what.removeprefix(f"{where(found.name)}: ").removesuffix(f". {NEXT_STEP}")}
        for found in verify(uri, arrays=arrays)
    ]
