"""The settings in which a run differs from the cache that it found."""

from collections.abc import Iterator
from typing import Any

from emkd.storage.manifest.manifest import UNCOMPARED, Manifest
from emkd.storage.manifest.plan import Extension

ROWS = frozenset({"dataset", "plan"})  # the fields in which an extension may differ from the manifest
# The template's hash is compared; the basis follows from the rest, and the cache's own is used, as is its clock.
_NOT_COMPARED: dict[str, Any] = {UNCOMPARED: True, "tokenizer": {"chat_template": True}, "basis": True, "clock": True}


def conflicts(cache: Manifest, run: Manifest) -> list[str]:
    """Return the settings in which a run differs from the cache that it found, one line per setting:
    "teacher.name: cache has 'a', this run 'b'".

    The rows of `run` may be those of the manifest or those of any extension.
    """
    if any(_extended_by(extension, run) for extension in cache.extensions):
        return setting_conflicts(cache, run)
    return _conflicts(cache, run, _NOT_COMPARED)


def setting_conflicts(cache: Manifest, run: Manifest) -> list[str]:
    """As `conflicts`, without comparing the rows: a run that extends the cache has to agree in the rest."""
    return _conflicts(cache, run, _NOT_COMPARED | dict.fromkeys(ROWS, True))


def _conflicts(cache: Manifest, run: Manifest, exclude: dict[str, Any]) -> list[str]:
    run = run.in_format(cache.format_version)
    if cache.lacks("config"):
        run = run.without("config")
    cache_dump, run_dump = (manifest.model_dump(mode="json", exclude=exclude) for manifest in (cache, run))
    return list(_differences("", cache_dump, run_dump))


def _extended_by(extension: Extension, run: Manifest) -> bool:
    rows = (run.dataset, run.plan.n_rows, run.plan.rows_per_shard)
    return rows == (extension.dataset, extension.n_rows, extension.rows_per_shard)


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


def _differences(path: str, cache: Any, run: Any) -> Iterator[str]:
    if isinstance(cache, dict) and isinstance(run, dict):
        for name in sorted(cache.keys() | run.keys()):
            inner = f"{path}.{name}" if path else name
            yield from _differences(inner, cache.get(name, _Absent()), run.get(name, _Absent()))
    elif isinstance(cache, list) and isinstance(run, list) and len(cache) == len(run):
        for i, (a, b) in enumerate(zip(cache, run, strict=True)):
            yield from _differences(f"{path}[{i}]", a, b)
    elif cache != run and not (isinstance(cache, _Absent) and isinstance(run, _Absent)):
        yield f"{path}: cache has {_short(cache)}, this run {_short(run)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
