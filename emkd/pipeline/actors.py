"""The workers of a job as Ray actors, and what a call on one of them returns or raises."""

from typing import Any

import ray

from emkd.errors import EmkdError, JobFailedError
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.storage.manifest.manifest import Manifest

# How often a shard is retried when its worker has died.
RETRIES = 2


def start_workers(settings: JobSettings, manifest: Manifest, count: int) -> list[Any]:
    """Start actors that hold the teacher. Ray restarts a killed actor and retries its call."""
    actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(CaptureWorker)
    options = {"num_cpus": 1, "num_gpus": settings.gpus_per_worker}
    return [actor.options(**options).remote(settings, manifest) for _ in range(count)]


def result_of(reference: Any) -> Any:
    """Return what a call on a worker returned.

    Raises the EmkdError that the call raised, or JobFailedError with the error of a worker that failed or died.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EmkdError):
            raise error.cause from None
        raise JobFailedError(f"a worker failed: {type(error.cause).__name__}: {error.cause}\n{error}") from error
    except ray.exceptions.RayError as error:
        raise JobFailedError(f"a worker died in each of {RETRIES + 1} attempts: {error}") from error
