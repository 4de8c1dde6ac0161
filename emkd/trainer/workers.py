"""Training on several processes through Ray Train: `emkd train-student --workers N`.

Each worker runs `train_one_process` as one rank of a torch process group (NCCL between GPUs, gloo between CPUs);
transformers and accelerate do the data parallelism. Checkpoints are in `--output`, which all workers have to share.

If a worker dies, all workers restart and resume from the last complete checkpoint, as long as it is newer than the last
complete checkpoint at the previous failure. Errors that emkd raises itself end the run immediately.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from emkd.background import BackgroundCall
from emkd.errors import EmkdError, JobFailedError
from emkd.ray_session import check_resources, session
from emkd.samples.sources.find import absolute_data
from emkd.trainer import report
from emkd.trainer.loop.checkpoints import last_complete
from emkd.trainer.loop.first_run import RUN_NAME
from emkd.trainer.loop.output import check_output
from emkd.trainer.recipe.settings import TrainSettings

# Ray Train's controller needs a CPU in addition to the workers' CPUs.
CONTROLLER_CPUS = 1


def train_on_workers(settings: TrainSettings) -> dict[str, float]:
    """Train on `settings.workers` ranks, and return the metrics of the first rank.

    Raises the EmkdError that a rank raised, UsageError if there are too few CPUs or GPUs, and JobFailedError if workers
    died twice without a new checkpoint in between.
    """
    check_output(settings)  # before any process starts
    if not settings.resume:  # left by a run that failed before its first step
        (settings.output / RUN_NAME).unlink(missing_ok=True)
    settings = _with_absolute_paths(settings)
    with session(
        settings.address, workers=settings.workers, gpus_per_worker=0, cpus=settings.workers + CONTROLLER_CPUS
    ):
        # GPUs of the cluster; the machine that runs this may have none.
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0 and not settings.recipe.training.get("use_cpu", False)
        check_resources(settings.workers, int(use_gpu), on_cpu="training.use_cpu: true in the recipe")
        with _relayed() as lines:
            return _until_done(settings, use_gpu, lines)


def _until_done(settings: TrainSettings, use_gpu: bool, lines: Queue) -> dict[str, float]:
    failed_after: list[Path | None] = []  # the last complete checkpoint at each failure
    while True:
        try:
            return _fit(settings, use_gpu, lines)
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {})
            for failure in failures.values():
                if isinstance(failure, EmkdError):
                    raise failure from None
            what = "; ".join(f"rank {rank}: {_short(failure)}" for rank, failure in failures.items()) or _short(error)
            failed_after.append(last_complete(settings.output, lambda _: None, verify=False))
            if failed_after[-2:] == failed_after[-1:] * 2:
                raise JobFailedError(
                    f"workers died twice without a new checkpoint in between: {what}. Saved checkpoints are kept; run "
                    "the same command again with --resume"
                ) from error
            report.log(f"a worker died ({what}); restarting from the last complete checkpoint")
            settings = replace(settings, resume=(settings.output / RUN_NAME).is_file())


def _fit(settings: TrainSettings, use_gpu: bool, lines: Queue) -> dict[str, float]:
    run: Any = _train_one_rank  # Ray annotates it as returning None, but its result has what it returns
    # The folder is for Ray Train's own files; checkpoints are in settings.output.
    with TemporaryDirectory(prefix="emkd-ray-train-") as folder:
        trainer = TorchTrainer(
            run,
            train_loop_config={"settings": settings, "lines": lines},
            scaling_config=ray.train.ScalingConfig(num_workers=settings.workers, use_gpu=use_gpu),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        # In the main thread Ray Train would handle Ctrl-C itself and end without a message.
        result: Any = BackgroundCall(trainer.fit, "emkd-ray-train").result()
    metrics: dict[str, float] = result.return_value
    return metrics


def _train_one_rank(config: dict[str, Any]) -> dict[str, float]:
    """Run one worker; its log lines go to the driver."""
    from emkd.trainer.run import train_one_process

    report.send_to(config["lines"].put)
    return train_one_process(replace(config["settings"], workers=1, address=None))  # a worker starts no others


@contextmanager
def _relayed() -> Iterator[Queue]:
    """Yield a queue whose lines are logged here as they arrive. (Ray's own forwarding mixes them with its notes.)"""
    lines, done = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def show() -> None:
        while True:
            try:
                report.tell(lines.get(timeout=0.2))
            except Empty:
                if done.is_set():
                    return
            except ray.exceptions.RayError:  # Ray has ended, and with it the workers that send lines
                return

    shown = BackgroundCall(show, "emkd-relay")
    try:
        yield lines
    finally:
        done.set()
        if shown.wait(timeout=10):
            _report_failure(shown)
        lines.shutdown()


def _report_failure(shown: BackgroundCall[None]) -> None:
    """Say that log lines are missing; training itself did not fail."""
    try:
        shown.result()
    except Exception as error:  # noqa: BLE001 - whatever a terminal or a pipe raises
        print(f"emkd: the log lines of the workers stopped: {_short(error)}", file=sys.stderr)


def _with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Make paths absolute, because workers run in another folder. Names on the hub and URIs stay as they are."""

    def absolute(name: str) -> str:
        return name if "://" in name else str(Path(name).absolute())

    return replace(
        settings,
        student=absolute(settings.student) if Path(settings.student).exists() else settings.student,
        data=absolute_data(settings.data),
        cache=None if settings.cache is None else absolute(settings.cache),
        eval_data=None if settings.eval_data is None else absolute_data(settings.eval_data),
        output=settings.output.absolute(),
        image_root=None if settings.image_root is None else settings.image_root.absolute(),
    )


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
