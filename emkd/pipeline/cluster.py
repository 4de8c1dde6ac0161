"""Ray: a session of our own or a cluster at an address, its actors, and what their calls end with."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from emkd.errors import EmkdError, JobFailedError, UsageError
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.storage.manifest import Manifest

# A shard whose worker died is tried again this often.
RETRIES = 2


@contextmanager
def session(settings: JobSettings) -> Iterator[None]:
    """A Ray session: one of our own, ended at the end, or the cluster at `settings.address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"num_cpus": settings.workers, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **({} if address else own),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobFailedError(f"Ray did not start ({address or 'on this machine'}): {error}") from error
    try:
        _check_resources(settings)
        yield
    finally:
        ray.shutdown()


def _check_resources(settings: JobSettings) -> None:
    """Ray would wait for ever for what the machine does not have."""
    have = ray.cluster_resources()
    needs = {"CPU": 1.0 * settings.workers, "GPU": settings.gpus_per_worker * settings.workers}
    for resource, need in needs.items():
        if have.get(resource, 0) < need:
            raise UsageError(
                f"{settings.workers} workers need {need:g} {resource}s and Ray has {have.get(resource, 0):g}; "
                + ("run on the CPU with --gpus-per-worker 0" if resource == "GPU" else "use fewer --workers")
            )


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
