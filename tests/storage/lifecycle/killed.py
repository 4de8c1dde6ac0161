"""What a job does with a cache, without a teacher and without Ray, in processes that are killed.

    python -m tests.storage.lifecycle.killed SCENARIO KIND FOLDER

KIND is "die", "torn" or "full" (see `operations`). For every n: a fresh copy of the scenario's start, a process that
ends at operation n, and a process that checks what is left and then runs to the end, undisturbed. Prints one JSON line
with the number of operations, then one line for each n. Processes are forked from this one, which never uses Zarr
itself: Zarr starts a thread, and threads do not survive a fork.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from emkd.errors import DamagedCacheError, InputNotFoundError
from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import commit_shard, delete_lost_attempts, missing_shards, read_index
from emkd.storage.lifecycle.extend import extend_cache
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.names import committed_shards
from emkd.storage.objects.open import open_files
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import (
    TOKENIZER_JSON,
    array_fields,
    keyed_rows,
    make_cache,
    make_manifest,
    make_rows,
    with_data,
)
from tests.storage.lifecycle.operations import WRITE, Operation, die_at, die_torn_at, full_from, watch

CONTENTS = {0: [0, 3, 1], 1: [1, None, 5, 0]}  # of the first dataset (row 1 is skipped), and of the added one
MANIFEST = make_manifest(n_rows=3)
ADDED = with_data(MANIFEST, "e" * 64, 4)


def capture(folder: str) -> None:
    """A minimal job: write the missing shards, then the seal."""
    files = open_files(folder)
    manifest = read_manifest(files)
    for shard in missing_shards(files, manifest):
        rows = make_rows(manifest, shard, contents=CONTENTS[manifest.source(shard)])
        commit_shard(files, write_shard(files, shard, uuid.uuid4().hex[:12], rows, manifest))
    seal(files)


def run_fresh(folder: str) -> None:
    create_cache(folder, MANIFEST, TOKENIZER_JSON)
    capture(folder)


def run_extend(folder: str) -> None:
    extend_cache(open_files(folder), ADDED, TOKENIZER_JSON, lambda: keyed_rows(CONTENTS[1]))
    capture(folder)


def run_repair(folder: str) -> None:
    withdraw(open_files(folder), verify(folder), MANIFEST, TOKENIZER_JSON)
    capture(folder)


def begin_extend(folder: str) -> None:
    """Both shards of the first plan, sealed."""
    make_cache(Path(folder), MANIFEST, contents=CONTENTS[0])


def begin_repair(folder: str) -> None:
    """Shard 1 has lost an object, the tokenizer and the consolidated index are changed."""
    make_cache(Path(folder), MANIFEST, contents=CONTENTS[0])
    Path(folder, "shards/000001-a1/vision_ids_low/zarr.json").unlink()
    Path(folder, "tokenizer.json").write_bytes(TOKENIZER_JSON[:-1] + b" ")
    Path(folder, "index.parquet").write_bytes(b"PAR1")


@dataclass(frozen=True)
class Scenario:
    """committed: shards that exist before the run and must not change;  damaged: reading may raise an error"""

    run: Callable[[str], None]
    begin: Callable[[str], None] | None = None
    committed: dict[int, str] = field(default_factory=dict)
    damaged: bool = False


SCENARIOS = {
    "fresh": Scenario(run_fresh),
    "extend": Scenario(run_extend, begin_extend, {0: "a0", 1: "a1"}),
    "repair": Scenario(run_repair, begin_repair, {0: "a0"}, damaged=True),
}


def records(cache: Cache) -> dict[str, str]:
    """{row of the data: hash of its record}."""
    return {row_of_data(cache, i): record_digest(cache, i) for i in range(cache.n_samples)}


def row_of_data(cache: Cache, i: int) -> str:
    """ "<dataset>-<row>" of a sample."""
    info = cache.sample_info(i)
    return f"{cache.manifest.source(info.shard)}-{info.row}"


def record_digest(cache: Cache, i: int) -> str:
    """Hash of everything that a reader gets of a sample."""
    info, record = cache.sample_info(i), cache.record(i)
    arrays = [(name, array.tolist()) for name, array in sorted(array_fields(record).items())]
    text = repr((info.key, record.key, info.images, record.images, arrays))
    return hashlib.sha256(text.encode()).hexdigest()


def plain_names(folder: str) -> list[str]:
    """Names of every file and folder, including hidden ones, without the names of attempts."""
    paths = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
    return sorted(re.sub(r"(shards/\d+)-[^/]+", r"\1", path) for path in paths)


def outcome(folder: str) -> dict[str, Any]:
    """Everything that must be as after an undisturbed run. Deletes lost attempts."""
    cache, files = Cache.open(folder), open_files(folder)
    skipped = [[row["shard"], row["row"], row["reason"], row["detail"]] for row in cache.skipped.to_pylist()]
    indexes = {shard: read_index(files, shard) for shard in cache.shards}
    objects = {n: {key: o.to_json() for key, o in sorted(index.objects.items())} for n, index in indexes.items()}
    found = {"sealed": cache.sealed, "damage": [damage.name for damage in verify(folder)], "records": records(cache)}
    delete_lost_attempts(files)
    return found | {"skipped": skipped, "objects": objects, "names": plain_names(folder)}


def check_between(folder: str, scenario: Scenario, expected: dict[str, str]) -> None:
    """A reader between the kill and the next run gets the committed records, and only those."""
    files = open_files(folder)
    try:
        cache = Cache.open(folder, partial=True)
        found = records(cache)
    except InputNotFoundError:
        assert not files.exists("manifest.json"), "a cache with a manifest was not found"
        return
    except DamagedCacheError:
        assert scenario.damaged, "damage where nothing was damaged"
        return
    assert set(cache.shards) == set(committed_shards(files)) & set(cache.manifest.shards)
    rows = {f"{cache.manifest.source(s)}-{row}" for s in cache.shards for row in cache.rows_of_shard(s)}
    assert found == {row: digest for row, digest in expected.items() if row in rows}


def run_again(folder: str, scenario: Scenario, expected: dict[str, Any]) -> None:
    check_between(folder, scenario, expected["records"])
    left = {path for path in Path(folder).rglob("*") if path.is_file()}
    scenario.run(folder)
    gone = {path for path in left if not path.exists()}
    assert not gone, f"the next run deleted {gone}"
    for shard, attempt in scenario.committed.items():
        assert read_index(open_files(folder), shard).attempt == attempt, f"shard {shard} was made again"
    found = json.loads(json.dumps(outcome(folder)))
    for name, value in expected.items():
        assert found[name] == value, f"{name}: {found[name]}\nexpected {value}"


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """(wait status, what `work` returns or the text of what it raises) of a forked process."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            value = {"value": work()}
        except BaseException as error:  # noqa: BLE001 (the parent reports all of it)
            value = {"error": traceback.format_exc(), "kind": type(error).__name__}
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(json.dumps(value).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    return os.waitpid(process, 0)[1], json.loads(data) if data else None


ENDS = {"die": die_at, "torn": die_torn_at, "full": full_from}


class Helper:
    """A process that stays alive and calls `work` on request, after it has used Zarr."""

    def __init__(self, work: Callable[[str], None]) -> None:
        asked, self._ask = os.pipe()
        self._answer, answered = os.pipe()
        if os.fork() == 0:
            os.close(self._ask)
            with os.fdopen(asked) as lines:
                for line in lines:
                    os.write(answered, json.dumps(self._do(work, json.loads(line))).encode() + b"\n")
            os._exit(0)
        os.close(answered)
        self._answers = os.fdopen(self._answer)

    @staticmethod
    def _do(work: Callable[[str], None], cache: str) -> str:
        try:
            work(cache)
        except Exception:  # noqa: BLE001 (the parent reports all of it)
            return traceback.format_exc()
        return ""

    def __call__(self, cache: str) -> str:
        """The traceback of an error, "" if there was none."""
        os.write(self._ask, json.dumps(cache).encode() + b"\n")
        return str(json.loads(self._answers.readline() or '"the helper died"'))


def one(scenario: Scenario, kind: str, n: int, folder: Path, again: Helper) -> dict[str, Any]:
    """The outcome of ending at operation n: {"n", "ended", "problem"}."""
    cache = str(folder / f"{kind}-{n}")
    if scenario.begin is not None:
        shutil.copytree(folder / "start", cache)

    def end_at_n() -> None:
        watch(cache, ENDS[kind](n))
        scenario.run(cache)

    status, said = in_child(end_at_n)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    ended = "SIGKILL" if killed else said.get("kind", "success")
    problem = again(cache)
    if problem:
        problem = f"after {said}\n{problem}"
    else:
        shutil.rmtree(cache)
    return {"n": n, "ended": ended, "problem": problem}


def main(name: str, kind: str, folder: Path, n_processes: int = 2) -> None:
    pa.Table.from_pylist([{"a": 1}])  # imports pandas: once here, not in each child
    scenario, undisturbed = SCENARIOS[name], str(folder / "undisturbed")
    if scenario.begin is not None:
        assert in_child(lambda: scenario.begin(str(folder / "start"))) == (0, {"value": None})
        shutil.copytree(folder / "start", undisturbed)

    def listed() -> list[str]:
        found: list[Operation] = []
        watch(undisturbed, found.append)
        scenario.run(undisturbed)
        return [operation.kind for operation in found]

    kinds = in_child(listed)[1]["value"]
    expected = in_child(lambda: outcome(undisturbed))[1]["value"]
    last = kinds.count(WRITE) if kind == "torn" else len(kinds)
    print(json.dumps({"last": last, "kinds": {k: kinds.count(k) for k in sorted(set(kinds))}, **expected}), flush=True)
    workers = []
    for start in range(1, 1 + n_processes):
        workers.append(os.fork())
        if workers[-1] == 0:
            again = Helper(lambda cache: run_again(cache, scenario, expected))
            for n in range(start, last + 1, n_processes):
                os.write(1, json.dumps(one(scenario, kind, n, folder, again)).encode() + b"\n")
            os._exit(0)
    for worker in workers:
        assert os.waitpid(worker, 0)[1] == 0


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve())
