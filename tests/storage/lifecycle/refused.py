"""Write to a disk that is full or not writable; test_refused runs this in a separate process.

    python -m tests.storage.lifecycle.refused full FOLDER      FOLDER is the root of a small file system
    python -m tests.storage.lifecycle.refused denied FOLDER    run as root: becomes a user who may not write there

Prints the outcome as JSON.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from emkd.errors import CacheWriteError, DamagedCacheError
from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.lifecycle.verify import Damage
from emkd.storage.objects.names import committed_shards
from emkd.storage.objects.open import open_files
from tests.storage.builders import TOKENIZER_JSON, make_cache
from tests.storage.lifecycle.killed import CONTENTS, MANIFEST, capture, in_child, outcome, records, run_fresh

PAGE, NOBODY = 4096, 65534


def full(folder: Path) -> list[dict[str, Any]]:
    """For every number of free pages from none to enough: a run that fails for lack of space, and one that completes."""
    undisturbed = folder / "undisturbed"
    run_fresh(str(undisturbed))
    expected = outcome(str(undisturbed))
    shutil.rmtree(undisturbed)
    found: list[dict[str, Any]] = []
    while not found or not found[-1]["sealed"]:
        cache, ballast = str(folder / f"cache-{len(found)}"), folder / "ballast"
        make_cache(Path(cache), MANIFEST, shards=[0], sealed=False, contents=CONTENTS[0])
        fill(ballast, free=PAGE * len(found))
        error = attempt(lambda at=cache: capture(at))
        files = open_files(cache)
        partial = Cache.open(cache, partial=True)
        rows = {f"0-{row}" for shard in partial.shards for row in partial.rows_of_shard(shard)}
        found.append({"error": error, "sealed": partial.sealed, "shards": committed_shards(files)})
        assert records(partial) == {row: digest for row, digest in expected["records"].items() if row in rows}
        assert verify(cache) == []
        assert len(files.folders("shards")) == len(committed_shards(files)), "half a shard was left"
        ballast.unlink()
        capture(cache)
        assert json.loads(json.dumps(outcome(cache))) == json.loads(json.dumps(expected))
        shutil.rmtree(cache)
    return found


def fill(ballast: Path, free: int) -> None:
    """Write a file that leaves `free` bytes free."""
    space = shutil.disk_usage(ballast.parent).free
    ballast.write_bytes(bytes(space - free))


def attempt(work) -> str | None:
    try:
        work()
    except (CacheWriteError, DamagedCacheError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def denied(folder: Path) -> dict[str, Any]:
    """The outcome for a user who may read a cache, but not write to it; then for a user who may not read a part."""
    cache = folder / "cache"
    make_cache(cache, MANIFEST, shards=[0], sealed=False, contents=CONTENTS[0])
    expected = records(Cache.open(cache, partial=True))
    make_cache(folder / "warm", MANIFEST)  # imports everything while the files are readable

    def as_nobody() -> dict[str, Any]:
        before = make_everything_known(cache)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        damage = [Damage(name="index/000000.parquet", what="for the test")]
        found = {
            "capture": attempt(lambda: capture(str(cache))),
            "create": attempt(lambda: create_cache(folder / "new", MANIFEST, TOKENIZER_JSON)),
            "withdraw": attempt(lambda: withdraw(open_files(cache), damage, MANIFEST, TOKENIZER_JSON)),
            "records": records(Cache.open(cache, partial=True)) == expected,
        }
        return found | {"unchanged": make_everything_known(cache) == before}

    def unreadable(name: str) -> dict[str, Any]:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        opening = attempt(lambda: Cache.open(cache, partial=True))
        return {"open": opening, "verify": attempt(lambda: verify(cache)) or [d.name for d in verify(cache)]}

    found = in_child(as_nobody)[1]
    for name in ("index", "index/000000.parquet"):
        mode = (cache / name).stat().st_mode
        (cache / name).chmod(0)
        found[name] = in_child(lambda at=name: unreadable(at))[1]
        (cache / name).chmod(mode)
    capture(str(cache))
    return found | {"sealed": Cache.open(cache).sealed}


def make_everything_known(cache: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    print(json.dumps({"full": full, "denied": denied}[sys.argv[1]](Path(sys.argv[2]).resolve())))
