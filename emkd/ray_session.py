"""A Ray session: Ray started on this machine and stopped at the end, or a cluster that runs already.

The teacher's job (pipeline/) and training on several workers (trainer/workers.py) use it; nothing else needs Ray.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from emkd.errors import JobFailedError, UsageError
from emkd.interrupt import finish_on_interrupt
from emkd.temporary import too_long_for_ray


@contextmanager
def session(
    address: str | None, *, workers: int, gpus_per_worker: float, cpus: int | None = None, worker_output: bool = False
) -> Iterator[None]:
    """Ray while open. Raises JobFailedError if it does not start, UsageError if it lacks what the workers need.

    address:        of a running cluster; None starts Ray on this machine, unless RAY_ADDRESS is set
    cpus:           of Ray on this machine; None means one per worker
    worker_output:  whether the output of workers is printed here
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    said = too_long_for_ray()
    if not address and said:
        raise UsageError(f"Ray cannot start: {said}")
    print(f"connecting to Ray at {address}" if address else "starting Ray on this machine", file=sys.stderr, flush=True)
    own: dict[str, Any] = {"num_cpus": cpus or workers, "include_dashboard": False}
    try:
        # A process that leaves Ray while Ray starts may crash at exit.
        with finish_on_interrupt("waiting for Ray to start") as interrupt:
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
            raise interrupt.error()
        check_resources(workers, gpus_per_worker)
        yield
    finally:
        ray.shutdown()


def check_resources(workers: int, gpus_per_worker: float, on_cpu: str = "--gpus-per-worker 0") -> None:
    """Raise UsageError if the workers need more than Ray has: Ray would wait forever.

    on_cpu: what to set to run without GPUs, for the message
    """
    have = ray.cluster_resources()
    needs = {"CPU": 1.0 * workers, "GPU": gpus_per_worker * workers}
    for resource, need in needs.items():
        if have.get(resource, 0) < need:
            raise UsageError(
                f"{workers} workers need {need:g} {resource}s and Ray has {have.get(resource, 0):g}; "
                + (f"run on the CPU with {on_cpu}" if resource == "GPU" else "use fewer --workers")
            )
