import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

INTERRUPTED = """
import os, signal, threading
import ray
from emkd.ray_session import session

threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    with session(None, workers=1, gpus_per_worker=0):
        print("went on")
except KeyboardInterrupt:
    print("interrupted, Ray is there:", ray.is_initialized())
"""


def test_ctrl_c_while_ray_starts_waits_for_it():
    """A process that exited during the start crashed now and then."""
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (0, "interrupted, Ray is there: False\n"), found.stderr
    assert "interrupted: waiting for Ray to start; press Ctrl-C again to stop immediately" in found.stderr
