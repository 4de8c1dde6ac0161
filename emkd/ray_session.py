"""A Ray session: one of our own on this machine, ended at the end, or a cluster that runs already.

Used by the teacher's job (pipeline/) and by training on several workers (trainer/launch.py); nothing else needs Ray.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from emkd.errors import JobFailedError, UsageError
from emkd.interrupt import finish_on_interrupt


@contextmanager
def session(
    address: str | None, *, workers: int, gpus_per_worker: float, cpus: int | None = None, worker_output: bool = False
) -> Iterator[None]:
    """Ray while open. Raises JobFailedError where it does not start, UsageError where it lacks what workers need.

    cpus:           of a session of our own; default: one for each worker
    worker_output:  whether what workers print comes out here
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"num_cpus": cpus or workers, "include_dashboard": False}
    try:
        # A process that leaves Ray while it starts may crash on its way out.
        with finish_on_interrupt("waiting for Ray to have started") as interrupt:
            ray.init(
                address=address or "local",
                log_to_driver=worker_output,
                logging_level=logging.ERROR,
                configure_logging=True,
                **({} if address else own),
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobFailedError(f"Ray did not start ({address or 'on this machine'}): {error}") from error
    try:
        if interrupt.asked:
            raise KeyboardInterrupt
        check_resources(workers, gpus_per_worker)
        yield
    finally:
        ray.shutdown()


def check_resources(workers: int, gpus_per_worker: float, on_cpu: str = "--gpus-per-worker 0") -> None:
    """Raises UsageError for more than Ray has: it would wait for it for ever."""
    have = ray.cluster_resources()
    needs = {"CPU": 1.0 * workers, "GPU": gpus_per_worker * workers}
    for resource, need in needs.items():
        if have.get(resource, 0) < need:
            raise UsageError(
                f"{workers} workers need {need:g} {resource}s and Ray has {have.get(resource, 0):g}; "
                + (f"run on the CPU with {on_cpu}" if resource == "GPU" else "use fewer --workers")
            )
