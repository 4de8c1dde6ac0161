"""Two concurrent plain processes on one cache.

    python -m tests.storage.lifecycle.race SCENARIO FOLDER REPETITIONS [clean]

clean: one process is fast; from its seal until the slow process ends, it deletes lost attempts over and over.
Prints the outcome of each repetition as JSON.
"""

import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from emkd.storage.index.commit import delete_lost_attempts
from emkd.storage.objects.open import open_files
from tests.storage.lifecycle.killed import SCENARIOS, Scenario, in_child, outcome
from tests.storage.lifecycle.operations import watch

SLOW = 0.004  # seconds before each operation of the slow process


def process(scenario: Scenario, cache: str, go: int, other: int | None, slow: bool) -> int:
    """The id of a process that starts when it can read from `go`; with `other`, it cleans until that process ends."""
    child = os.fork()
    if child:
        return child
    try:
        os.read(go, 1)
        if slow:
            watch(cache, lambda operation: time.sleep(SLOW))
        scenario.run(cache)
        while other is not None and alive(other):
            delete_lost_attempts(open_files(cache))
        os._exit(0)
    except BaseException:  # noqa: BLE001 (a process must end here)
        traceback.print_exc()
        os._exit(1)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def race(scenario: Scenario, cache: str, clean: bool) -> tuple[int, int]:
    """Exit codes of the two processes."""
    go, start = os.pipe()
    first = process(scenario, cache, go, None, slow=clean)
    os.set_inheritable(start, False)
    second = process(scenario, cache, go, first if clean else None, slow=False)
    os.write(start, b"go")
    return tuple(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (first, second))


def main(name: str, folder: Path, repetitions: int, clean: bool) -> None:
    scenario, found = SCENARIOS[name], []
    expected: dict[str, Any] | None = None
    for i in range(-1, repetitions):
        cache = str(folder / f"{name}-{i}")
        if scenario.begin is not None:
            in_child(lambda at=cache: scenario.begin(at))
        codes = (in_child(lambda at=cache: scenario.run(at))[0], 0) if i < 0 else race(scenario, cache, clean)
        result = in_child(lambda at=cache: outcome(at))[1]
        if i < 0:
            expected = result
        found.append({"codes": codes, "same": result == expected, "result": result if result != expected else None})
        shutil.rmtree(cache)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), int(sys.argv[3]), "clean" in sys.argv[4:])
