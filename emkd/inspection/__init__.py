"""What a cache holds, for people and for scripts; imported, this room brings neither torch, transformers nor Ray.

Reading order: damage.py (opening, or what stands in its way), summary.py (the whole cache), sample.py (one of
its samples; heatmap.py has the numbers of its affinity), render.py and render_sample.py (on a terminal).

What needs torch and a teacher is imported only when a comparison is asked for: against_teacher.py (the whole of it),
live.py (the teacher, and rows as it reads them), differences.py and vlm/tolerance.py (numbers, and what they may be),
cache_fidelity.py, fidelity.py and stand_in.py (what cutting the teacher does), render_comparison.py.
"""

from pathlib import Path
from typing import Any

from emkd.inspection.damage import damage_report, open_for_inspection, open_or_list_damage
from emkd.inspection.render import render
from emkd.inspection.sample import describe_sample
from emkd.inspection.summary import summarize

__all__ = ["inspect_cache", "render"]


def inspect_cache(uri: str | Path, *, sample: str | None = None, verify_bytes: bool = False) -> dict[str, Any]:
    """A report as plain values (what `emkd inspect --json` prints).

    sample:        a key, the beginning of one, or an id: the report then holds that sample alone
                   (`describe_sample`), else the whole cache (`summarize`)
    verify_bytes:  reads and checks everything; the report then has `damaged`, a list of {name, what}, also
                   where it is empty

    A cache may be written to meanwhile: what is committed at this moment is reported. Where something is
    damaged that a summary needs, or anything with `verify_bytes`, the report is {uri, sealed, damaged,
    verified} and nothing else: numbers of such a cache could not be trusted. Without `verify_bytes` the list
    is complete for all but the shards' arrays.

    Raises InputNotFoundError, CacheVersionError; with `sample` SampleNotFoundError, UsageError (an id of
    several samples), and DamagedCacheError where the sample cannot be read.
    """
    if sample is not None and not verify_bytes:
        return _report(uri, describe_sample(open_for_inspection(uri), sample), verified=False)
    cache, damaged = open_or_list_damage(uri, arrays=verify_bytes)
    if cache is None or damaged:
        return damage_report(uri, damaged, verified=verify_bytes)
    report = summarize(cache) if sample is None else describe_sample(cache, sample)
    return _report(uri, report, verified=verify_bytes)


def _report(uri: str | Path, report: dict[str, Any], *, verified: bool) -> dict[str, Any]:
    return {"uri": str(uri), **report, **({"damaged": []} if verified else {}), "verified": verified}
