"""From the teacher to the cache.

The modules, in reading order:

    settings       what the user chooses
    job_manifest   the manifest of a job, from its settings
    row_reader     rows of a shard become the teacher's inputs
    read_ahead     the rows of the next shard, read during the passes over this one
    batching       which rows go through the teacher together
    topk           the k largest logits, chunk by chunk
    out_of_memory  what counts as running out of memory, and how to continue with less
    shared_images  images that several rows of a shard show
    capture        rows become records; runs without Ray
    worker         one shard after the other: read, capture, write, commit
    skipped        rows that cannot be used, against --max-skipped: before, during and after the job
    skipped_before rows that earlier runs skipped
    actors         the workers as Ray actors
    shard_pool     which worker captures which shard
    basis          columns of hidden states, and the error of logits that are read from them
    basis_choice   which basis a job gets, from what was asked for and a few rows
    cache_size     how large a cache will be, from a few rows
    preflight      size and time of the job before it starts
    for_student    whether a student will be able to use the cache
    progress       what the driver logs while the job runs
    job            the whole job, from its settings to the seal
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
