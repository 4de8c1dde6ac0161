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

from emkd.errors import UsageError
from emkd.inspection.damage import damage_report, open_for_inspection, open_or_list_damage
from emkd.inspection.report.listing import list_samples
from emkd.inspection.report.sample import describe_sample
from emkd.inspection.report.summary import summarize
from emkd.inspection.terminal.report import render
from emkd.storage.cache import Cache

__all__ = ["inspect_cache", "render"]


def inspect_cache(
    uri: str | Path, *, sample: str | int | None = None, page: int | None = None, verify_bytes: bool = False
) -> dict[str, Any]:
    """Return a report as plain values (what `emkd inspect --json` prints).

    sample:        a key, the beginning of a key, an id or a number: report that sample (`describe_sample`) instead of
                   the whole cache (`summarize`)
    page:          list the samples of this page, from 1 (`list_samples`), instead of the whole cache
    verify_bytes:  read and check everything; the report then has `damaged`, a list of {name, what}, which may be empty

    A job may be writing the cache: the report covers what is committed at this moment. If something is damaged that a
    summary needs (with `verify_bytes`: if anything is), the report is {uri, sealed, damaged, verified} and nothing
    else: the numbers of such a cache could not be trusted. Without `verify_bytes` the list is complete except for the
    shards' arrays.

    Raises InputNotFoundError, CacheVersionError; with `sample` or `page` SampleNotFoundError, UsageError (several
    samples have that id), and DamagedCacheError if a sample cannot be read.
    """
    if sample is not None and page is not None:
        raise UsageError("--sample shows one sample and --list a page of them: leave out one of the two")
    if (sample is not None or page is not None) and not verify_bytes:
        return _report(uri, _samples(open_for_inspection(uri), sample, page), verified=False)
    cache, damaged = open_or_list_damage(uri, arrays=verify_bytes)
    if cache is None or damaged:
        return damage_report(uri, damaged, verified=verify_bytes)
    report = summarize(cache) if sample is None and page is None else _samples(cache, sample, page)
    return _report(uri, report, verified=verify_bytes)


def _samples(cache: Cache, sample: str | int | None, page: int | None) -> dict[str, Any]:
    return list_samples(cache, 1 if page is None else page) if sample is None else describe_sample(cache, str(sample))


def _report(uri: str | Path, report: dict[str, Any], *, verified: bool) -> dict[str, Any]:
    return {"uri": str(uri), **report, **({"damaged": []} if verified else {}), "verified": verified}
