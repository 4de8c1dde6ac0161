"""The job's Ray actors, and what their calls end with."""

from typing import Any

import ray

from emkd.errors import EmkdError, JobFailedError
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.storage.manifest.manifest import Manifest

# A shard whose worker died is tried again this often.
RETRIES = 2


def start_workers(settings: JobSettings, manifest: Manifest, count: int) -> list[Any]:
    """Actors that hold the teacher; a killed one is restarted and its call tried again."""
    actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(CaptureWorker)
    options = {"num_cpus": 1, "num_gpus": settings.gpus_per_worker}
    return [actor.options(**options).remote(settings, manifest) for _ in range(count)]


def result_of(reference: Any) -> Any:
    """What a call on a worker returned. Raises what it raised, where that is an error of ours, and JobFailedError
    with the last words of a worker that broke or died."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EmkdError):
            raise error.cause from None
        raise JobFailedError(f"a worker failed: {type(error.cause).__name__}: {error.cause}\n{error}") from error
    except ray.exceptions.RayError as error:
        raise JobFailedError(f"a worker died, and was tried {RETRIES + 1} times: {error}") from error
