"""Read everything of a cache in every way that a user has.

    python -m tests.storage.use_all GOOD BAD...

prints {name of a BAD: {"errors": [...], "more_mib": how much the process grew}}, after it has read GOOD.
"""

import contextlib
import io
import json
import resource
import sys
import traceback
from pathlib import Path

from rich.console import Console

from emkd.errors import CacheError, SampleNotFoundError
from emkd.inspection import inspect_cache, render
from emkd.storage.cache import Cache, verify

WAYS = (
    lambda path: _read(path, partial=False),
    lambda path: _read(path, partial=True),
    lambda path: _inspect(path),
    lambda path: _inspect(path, verify_bytes=True),
    lambda path: _inspect(path, page=1),
    lambda path: _inspect(path, sample="0"),
    lambda path: verify(path),
)


def use_all(path, ways=WAYS) -> tuple[str, ...]:
    """The errors of each way, by their names; any exception that is not one of a cache leaves this function."""
    found = []
    for way in ways:
        try:
            way(path)
            found.append("")
        except CacheError as error:
            found.append(type(error).__name__)
    return tuple(found)


def _read(path, partial):
    cache = Cache.open(path, partial=partial)
    for number in range(cache.n_samples):
        record = cache.record(number)
        cache.affinity(record)
        assert record.text_ids[record.answer_positions].shape == record.answer_positions.shape
        cache.sample_info(number)
    _ = cache.samples, cache.skipped, cache.sample_rows
    with contextlib.suppress(SampleNotFoundError):
        cache.find("no such key")


def _inspect(path, **what):
    report = inspect_cache(path, **what)
    json.dumps(report)
    render(report, Console(file=io.StringIO(), width=80))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    good, *bad = map(Path, sys.argv[1:])
    assert not any(use_all(good))
    results = {}
    for path in bad:
        before = peak_mib()
        try:
            errors = sorted({error for error in use_all(path) if error})
        except Exception:  # noqa: BLE001  it is what is looked for
            errors = [traceback.format_exc()]
        results[path.name] = {"errors": errors, "more_mib": peak_mib() - before}
    print(json.dumps(results))
