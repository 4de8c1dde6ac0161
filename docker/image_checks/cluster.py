"""Starts what compose.yaml names as plain processes of this machine: head, worker, then jobs on the cluster.

Commands and health checks are those of compose.yaml. Changed are only:

    ray-head:6379     an address 127.0.0.2 with a free port; each service has an address of its own
    /shared           a folder below the cluster's folder
    --num-cpus=2      1, and small object stores
    ray start         with --node-ip-address and --temp-dir, which a container has for itself

Where the check is run by root, the services run as nobody, who is as little root as the image's user. Every
process that a service starts carries a mark in its environment; what has the mark is ended, by its id, and
nothing else.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from image_checks.build import Built, Say
from image_checks.compose import Compose, health_script, start_script

NOBODY = 65534
OBJECT_STORE_BYTES = 100_000_000
HEALTHY_WITHIN_S = 90
GRACE_S = 15


class ClusterError(RuntimeError):
    """A service that did not start, did not become healthy, or a job that failed."""


@dataclass(kw_only=True)
class Cluster:
    """Running services; `folder` is short, because Ray's sockets lie below it and their paths must be."""

    compose: Compose
    built: Built
    folder: Path
    say: Say
    user: int | None
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Starts a service and, where it has a health check, waits until that passes."""
        service = self.compose.services[name]
        for target in service.get("depends_on", {}):
            if target not in self.running:
                self.start(target)
        script = self.adapted(name, start_script(service))
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                ["sh", "-euc", script],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self._as_user(name),
            )
        self.say(f"{name}: started: {'; '.join(script.splitlines())}")
        if "healthcheck" in service:
            started = time.monotonic()
            self._wait_healthy(name, self.adapted(name, health_script(service)))
            self.say(f"{name}: healthy after {time.monotonic() - started:.0f} s")

    def run(self, name: str, command: list[str], timeout_s: float) -> str:
        """One command with the environment of a service; its output. Raises ClusterError where it fails."""
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
            **self._as_user(name),
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def wait(self, name: str, timeout_s: float) -> str:
        """Waits for a service that ends by itself; its output. Raises ClusterError where it fails."""
        code = self.running[name].wait(timeout_s)
        text = self.log(name)
        if code:
            raise ClusterError(f"{name} ended with {code}:\n{text}")
        return text

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    @property
    def address(self) -> str:
        return f"{self._ip('ray-head')}:{self.port}"

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def adapted(self, name: str, script: str) -> str:
        """The service's script as it can run outside of a container."""
        temp = self.folder / f"ray-{list(self.compose.services).index(name)}"
        own = f"--node-ip-address={self._ip(name)} --temp-dir={temp} --object-store-memory={OBJECT_STORE_BYTES}"
        for old, new in (
            ("ray-head:6379", self.address),
            ("--port=6379", f"--port={self.port}"),
            ("--num-cpus=2", "--num-cpus=1"),
            ("ray start", f"ray start {own}"),
            ("/shared", str(self.shared)),
        ):
            script = script.replace(old, new)
        return script

    def end(self) -> None:
        """Ends every process with our mark: asked, then killed. Raises ClusterError for any that is left."""
        for ask in (signal.SIGTERM, signal.SIGKILL):
            found = self._marked()
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(ask)
            psutil.wait_procs(found, timeout=GRACE_S)
        left = [process.pid for process in self._marked()]
        if left:
            raise ClusterError(f"processes that do not end: {left}")

    def _marked(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and self._mark.items() <= process.environ().items()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    @property
    def _mark(self) -> dict[str, str]:
        return {"EMKD_IMAGE_CHECK": str(self.folder)}

    def _ip(self, name: str) -> str:
        return f"127.0.0.{2 + list(self.compose.services).index(name)}"

    def _as_user(self, name: str) -> dict[str, Any]:
        """Environment, working folder and user of a service's processes."""
        kept = {name: self.built.env[name] for name in self.built.env if not name.startswith("PIP_")}
        given: Mapping[str, str] = self.compose.services[name].get("environment", {})
        adapted = {key: str(value).replace("/shared", str(self.shared)) for key, value in given.items()}
        env = {**kept, **adapted, **self._mark, "HOME": str(self.folder / "home"), "TMPDIR": str(self.folder)}
        dropped = {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}
        return {"env": env, "cwd": self.shared, **dropped}

    def _wait_healthy(self, name: str, script: str) -> None:
        until = time.monotonic() + HEALTHY_WITHIN_S
        while time.monotonic() < until:
            if self.running[name].poll() is not None:
                raise ClusterError(f"{name} ended with {self.running[name].returncode}:\n{self.log(name)}")
            checked = subprocess.run(["sh", "-c", script], capture_output=True, check=False, **self._as_user(name))
            if checked.returncode == 0:
                return
            time.sleep(1)
        raise ClusterError(f"{name} is not healthy after {HEALTHY_WITHIN_S} s:\n{self.log(name)}")


@contextmanager
def cluster(compose: Compose, built: Built, folder: Path, say: Say) -> Iterator[Cluster]:
    """A cluster in `folder`, which must be new; all of its processes are ended when the block is left."""
    user = NOBODY if os.geteuid() == 0 else None
    folder.chmod(0o755)
    for place in (folder, folder / "home", folder / "shared"):
        place.mkdir(exist_ok=True)
        if user is not None:
            os.chown(place, user, user)
    services = Cluster(compose=compose, built=built, folder=folder, say=say, user=user, port=_free_port())
    try:
        yield services
    finally:
        services.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port: int = probe.getsockname()[1]
        return port
