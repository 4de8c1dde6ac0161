"""The command lines of compose.yaml start a Ray head and a worker, here as processes on loopback addresses."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.docker.compose_file import compose, health_script, start_script


def marked(folder: str) -> list[psutil.Process]:
    """Every living process with this HOME."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("HOME") == folder:
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_head_and_worker_start_and_become_healthy():
    folder = tempfile.mkdtemp(prefix="emkd-", dir="/tmp")  # sockets are in it: the path must be short
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": folder}
    env |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    running = []
    try:
        for n, name in enumerate(("ray-head", "ray-worker"), start=2):
            node = f"--node-ip-address=127.0.0.{n} --temp-dir={folder}/{n} --object-store-memory=100000000"
            changes = {"ray-head:6379": f"127.0.0.2:{port}", "=6379": f"={port}", "ray start": f"ray start {node}"}
            start, health = start_script(compose()["services"][name]), health_script(compose()["services"][name])
            for old, new in changes.items():
                start, health = start.replace(old, new), health.replace(old, new)
            running.append(subprocess.Popen(["sh", "-euc", start], env=env, cwd=folder))
            until = time.monotonic() + 120
            while subprocess.run(["sh", "-c", health], env=env, cwd=folder, capture_output=True).returncode:
                assert running[-1].poll() is None, f"{name} ended"
                assert time.monotonic() < until, f"{name} is not healthy"
                time.sleep(1)
    finally:
        while found := marked(folder):
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found)
        for process in running:
            process.wait()
        shutil.rmtree(folder)
