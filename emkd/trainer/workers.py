"""Training on several processes through Ray Train: `emkd train-student --workers N`.

Each worker runs `train_one_process` as one rank of a torch process group (NCCL between GPUs, gloo between CPUs);
transformers and accelerate do the data parallelism. Checkpoints are in `--output`, which all workers have to share.

If a worker dies, all workers restart and resume from the last complete checkpoint, as long as it is newer than the last
complete checkpoint at the previous failure. Errors that emkd raises itself end the run immediately.

SIGINT and SIGTERM reach the driver, which tells an actor; the first rank asks the actor twice a second, and the ranks
agree on the step after which they stop (loop/stopping.py).
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from emkd.background import BackgroundCall
from emkd.errors import EmkdError, JobFailedError
from emkd.interrupt import Interrupt, by_signals
from emkd.ray_session import check_resources, session
from emkd.samples.sources.find import absolute_data, find_files
from emkd.trainer import report
from emkd.trainer.data.run_data import open_cache
from emkd.trainer.display import has_terminal
from emkd.trainer.loop.checkpoints import last_complete
from emkd.trainer.loop.first_run import RUN_NAME
from emkd.trainer.loop.output import check_output
from emkd.trainer.recipe.arguments import training_arguments
from emkd.trainer.recipe.settings import TrainSettings
from emkd.vlm.loading import resolve

# Ray Train's controller needs a CPU in addition to the workers' CPUs.
CONTROLLER_CPUS = 1

POLL_SECONDS = 0.5  # how often driver and first rank look for a signal


def train_on_workers(settings: TrainSettings) -> dict[str, float]:
    """Train on `settings.workers` ranks, and return the metrics of the first rank.

    Raises the EmkdError that a rank raised, UsageError if there are too few CPUs or GPUs, and JobFailedError if workers
    died twice without a new checkpoint in between.
    """
    with report.quiet():
        _check_before_ray(settings)
    if not settings.resume:  # left by a run that failed before its first step
        (settings.output / RUN_NAME).unlink(missing_ok=True)
    settings = _with_absolute_paths(settings)
    # Before the ranks train, there is nothing to save: then a signal ends the run at once.
    interrupt = Interrupt(lambda _: None)
    with session(
        settings.address, workers=settings.workers, gpus_per_worker=0, cpus=settings.workers + CONTROLLER_CPUS
    ):
        # GPUs of the cluster; the machine that runs this may have none.
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0 and not settings.recipe.training.get("use_cpu", False)
        check_resources(settings.workers, int(use_gpu), on_cpu="training.use_cpu: true in the recipe")
        signals = by_signals(interrupt) if settings.recipe.save_on_signal else nullcontext()
        with _relayed() as lines, signals:
            return _until_done(settings, use_gpu, lines, interrupt)


def _check_before_ray(settings: TrainSettings) -> None:
    """Raise what a rank would raise for the same call, as far as it can be known before any process starts.

    This machine may have no GPU, so that nothing about devices is asked.
    """
    check_output(settings)
    of_devices = ("use_cpu", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "optim")
    training = {name: value for name, value in settings.recipe.training.items() if name not in of_devices}
    training_arguments(settings.output, {**training, "use_cpu": True}, settings.eval_data is not None)
    resolve(settings.student, settings.revision)
    open_cache(settings)
    for data in filter(None, (settings.data, settings.eval_data)):
        find_files(data)


@ray.remote(num_cpus=0)
class _StopRequest:
    """What the driver and the first rank tell each other about stopping."""

    def __init__(self) -> None:
        self._signal, self._trains = 0, False

    def ask(self, number: int) -> bool:
        """Ask the ranks to stop because of a signal. Return whether they train, and so will save a checkpoint."""
        self._signal = number
        return self._trains

    def asked(self) -> int:
        """Return the signal because of which the ranks shall stop; 0 if there was none."""
        self._trains = True
        return self._signal


def _until_done(settings: TrainSettings, use_gpu: bool, lines: Queue, interrupt: Interrupt) -> dict[str, float]:
    failed_after: list[Path | None] = []  # the last complete checkpoint at each failure
    while True:
        try:
            return _fit(settings, use_gpu, lines, interrupt)
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {})
            for failure in failures.values():
                if isinstance(failure, EmkdError):
                    raise failure from None
            if interrupt.asked:  # the signal ended a rank, too
                raise interrupt.error() from error
            what = "; ".join(f"rank {rank}: {_short(failure)}" for rank, failure in failures.items()) or _short(error)
            failed_after.append(last_complete(settings.output, lambda _: None, verify=False))
            if failed_after[-2:] == failed_after[-1:] * 2:
                raise JobFailedError(
                    f"workers died twice without a new checkpoint in between: {what}. Saved checkpoints are kept; run "
                    "the same command again with --resume"
                ) from error
            report.log(f"a worker died ({what}); restarting from the last complete checkpoint")
            settings = replace(settings, resume=(settings.output / RUN_NAME).is_file())


def _fit(settings: TrainSettings, use_gpu: bool, lines: Queue, interrupt: Interrupt) -> dict[str, float]:
    report.log(f"starting {settings.workers} workers")
    stop: Any = _StopRequest.remote()  # type: ignore[attr-defined]
    run: Any = _train_one_rank  # Ray annotates it as returning None, but its result has what it returns
    # The folder is for Ray Train's own files; checkpoints are in settings.output.
    with TemporaryDirectory(prefix="emkd-ray-train-") as folder:
        trainer = TorchTrainer(
            run,
            train_loop_config={"settings": settings, "lines": lines, "stop": stop, "terminal": has_terminal()},
            scaling_config=ray.train.ScalingConfig(num_workers=settings.workers, use_gpu=use_gpu),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        # In the main thread Ray Train would handle Ctrl-C itself and end without a message.
        call: BackgroundCall[Any] = BackgroundCall(trainer.fit, "emkd-ray-train")
        while not call.wait(POLL_SECONDS):
            if interrupt.asked:
                if not ray.get(stop.ask.remote(interrupt.signal)):
                    raise interrupt.error()
                break
        result = call.result()
    metrics: dict[str, float] = result.return_value
    return metrics


def _train_one_rank(config: dict[str, Any]) -> dict[str, float]:
    """Run one worker; its log lines go to the driver."""
    from emkd.trainer.run import train_one_process

    if config["terminal"]:
        report.forward_to(config["lines"].put)
    else:
        report.send_to(config["lines"].put)

    @contextmanager
    def from_driver(interrupt: Interrupt) -> Iterator[None]:
        ended = threading.Event()
        if report.rank() == 0:
            BackgroundCall(partial(_pass_on, config["stop"], interrupt, ended), "emkd-stop-request")
        try:
            yield
        finally:
            ended.set()

    settings = replace(config["settings"], workers=1, address=None)  # a worker starts no others
    return train_one_process(settings, from_driver)


def _pass_on(stop: Any, interrupt: Interrupt, ended: threading.Event) -> None:
    """Ask the driver for a signal until there is one, or the training has ended."""
    while not ended.wait(POLL_SECONDS):
        number = ray.get(stop.asked.remote())
        if number:
            interrupt.ask(number)
            return


@contextmanager
def _relayed() -> Iterator[Queue]:
    """Yield a queue whose lines are logged here as they arrive. (Ray's own forwarding mixes them with its notes.)"""
    lines, done = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def show() -> None:
        while True:
            try:
                report.deliver(lines.get(timeout=0.2))
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
        report.display().close()
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
