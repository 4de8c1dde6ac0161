"""The teacher's way to the cache.

Reading order: settings.py (what the user chooses), identify.py (the manifest), batching.py, topk.py, capture.py
(rows to records, no Ray), worker.py (one shard after the other), job.py (the Ray job).
"""

from typing import TYPE_CHECKING, Any

from emkd.pipeline.settings import JobSettings

if TYPE_CHECKING:
    from emkd.pipeline.job import cache_teacher as cache_teacher

__all__ = ["JobSettings", "cache_teacher"]


def __getattr__(name: str) -> Any:
    if name == "cache_teacher":  # the only thing here that needs Ray
        from emkd.pipeline.job import cache_teacher

        return cache_teacher
    raise AttributeError(f"module 'emkd.pipeline' has no attribute {name!r}")
