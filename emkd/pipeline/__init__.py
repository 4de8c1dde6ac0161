"""The teacher's way to the cache.

Reading order: settings.py (what the user chooses), identify.py (the manifest), batching.py, topk.py, memory.py (what
to do when it runs out), reading.py (rows before their pass), capture.py (rows to records, no Ray), shared.py (images
that rows have in common), behind.py (what goes on behind the next pass), worker.py (one shard after the other), job.py
(the whole job), cluster.py (Ray), pull.py (workers and shards), for_student.py, preflight.py and sizes.py (size and
time beforehand), progress.py (what is told on the way).
"""

from typing import TYPE_CHECKING, Any

from emkd.pipeline.settings import JobSettings

if TYPE_CHECKING:
    from emkd.pipeline.job import cache_teacher as cache_teacher
    from emkd.pipeline.job import estimate_job as estimate_job

__all__ = ["JobSettings", "cache_teacher", "estimate_job"]


def __getattr__(name: str) -> Any:
    if name in ("cache_teacher", "estimate_job"):  # what needs Ray
        from emkd.pipeline import job

        return getattr(job, name)
    raise AttributeError(f"module 'emkd.pipeline' has no attribute {name!r}")
