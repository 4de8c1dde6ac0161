"""What a cache holds, for people and for scripts; imports neither torch, transformers nor Ray.

Reading order: summary.py (the whole cache), sample.py (one of its samples), render.py (both on a terminal).
"""

from pathlib import Path
from typing import Any

from emkd.inspection.render import render
from emkd.inspection.sample import describe_sample
from emkd.inspection.summary import summarize
from emkd.storage.cache import Cache, verify

__all__ = ["inspect_cache", "render"]


def inspect_cache(uri: str | Path, *, sample: str | None = None, verify_bytes: bool = False) -> dict[str, Any]:
    """A report as plain values (what `emkd inspect --json` prints).

    sample:        a key, the beginning of one, or an id: the report then holds that sample alone
    verify_bytes:  reads and checks everything; the report then has `damaged`, a list of {name, what}

    Raises InputNotFoundError, SampleNotFoundError, CacheVersionError, DamagedCacheError.
    """
    if verify_bytes:
        damaged = [{"name": damage.name, "what": damage.what} for damage in verify(uri)]
        if damaged:  # what is damaged cannot be summarised with confidence
            return {"uri": str(uri), "damaged": damaged}
    cache = Cache.open(uri, partial=True, window=1)
    report = summarize(cache) if sample is None else describe_sample(cache, sample)
    return {"uri": str(uri), **report, **({"damaged": []} if verify_bytes else {})}
