"""Open a cache for inspection, or list what is damaged in it as {name, what}.

Plain inspection looks for damage only if opening the cache fails, and does not read the shards' arrays, so that it
stays instant; with `arrays` everything is read.
"""

from pathlib import Path
from typing import Any

from emkd.errors import DamagedCacheError
from emkd.storage.cache import Cache, verify
from emkd.storage.lifecycle.seal import read_seal
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.open import open_files


def open_for_inspection(uri: str | Path) -> Cache:
    """Open a cache, sealed or not, with one decoded shard at a time in memory. Raises what Cache.open raises."""
    return Cache.open(uri, partial=True, window=1)


def open_or_list_damage(uri: str | Path, *, arrays: bool) -> tuple[Cache | None, list[dict[str, str]]]:
    """Return the cache (None if what describes it is damaged) and everything that is damaged, as {name, what}.

    The cache is opened before it is verified: shards that a running job commits in between are then verified but not
    reported, and never reported without being verified. If opening fails and no damage is found, a job has repaired or
    replaced the object in between, and opening again shows the present state. Raises InputNotFoundError,
    CacheVersionError.
    """
    try:
        cache = open_for_inspection(uri)
    except DamagedCacheError:
        found = _damages(uri, arrays)
        return (None, found) if found else (open_for_inspection(uri), [])
    return cache, _damages(uri, arrays) if arrays else []


def damage_report(uri: str | Path, damaged: list[dict[str, str]], *, verified: bool) -> dict[str, Any]:
    """Return the report that replaces a summary. `sealed` is None if that cannot be read."""
    return {"uri": str(uri), "sealed": _sealed(uri), "damaged": damaged, "verified": verified}


def _sealed(uri: str | Path) -> bool | None:
    try:
        return read_seal(open_files(uri)) is not None
    except DamagedCacheError:
        return None


def _damages(uri: str | Path, arrays: bool) -> list[dict[str, str]]:
    """In the order of `verify`; the object's name and the next step, which its texts repeat, are removed."""
    where = open_files(uri).where
    return [
        {"name": found.name, "what": found.what.removeprefix(f"{where(found.name)}: ").removesuffix(f". {NEXT_STEP}")}
        for found in verify(uri, arrays=arrays)
    ]
