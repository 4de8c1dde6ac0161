"""Report what a cache holds, for people and scripts, and compare it with a live teacher.

The modules and packages, in reading order:

    damage      open a cache, or list what is damaged in it
    report/     plain values: the whole cache, or one sample and the numbers of its heat maps
    terminal/   the same reports printed
    compare/    a live teacher against the cache: `emkd inspect --against-teacher`
    fidelity/   what storing k of V logits does to matching and losses

Importing this package imports neither torch nor transformers nor Ray; compare/ and fidelity/ import torch, and are
imported only when you ask for a comparison.
"""

from pathlib import Path
from typing import Any

from emkd.inspection.damage import damage_report, open_for_inspection, open_or_list_damage
from emkd.inspection.report.sample import describe_sample
from emkd.inspection.report.summary import summarize
from emkd.inspection.terminal.report import render

__all__ = ["inspect_cache", "render"]


def inspect_cache(uri: str | Path, *, sample: str | None = None, verify_bytes: bool = False) -> dict[str, Any]:
    """Return a report as plain values (what `emkd inspect --json` prints).

    sample:        a key, the beginning of a key, or an id: report that sample (`describe_sample`) instead of the whole
                   cache (`summarize`)
    verify_bytes:  read and check everything; the report then has `damaged`, a list of {name, what}, which may be empty

    A job may be writing the cache: the report covers what is committed at this moment. If something is damaged that a
    summary needs (with `verify_bytes`: if anything is), the report is {uri, sealed, damaged, verified} and nothing
    else: the numbers of such a cache could not be trusted. Without `verify_bytes` the list is complete except for the
    shards' arrays.

    Raises InputNotFoundError, CacheVersionError; with `sample` SampleNotFoundError, UsageError (several samples have
    that id), and DamagedCacheError if the sample cannot be read.
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
