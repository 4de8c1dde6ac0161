"""Change a cache at random and read it, within limits of time and memory.

    python -m tests.storage.fuzz CACHE SEED SECONDS

prints {"tries", "errors": {name: how often}, "more_mib": how much the process grew} or the first change that ends in
anything but an error of a cache. Half of the changes are those of a bad disk (bytes), whose hashes no longer fit; the
other half are a stranger's, whose hashes all fit.
"""

import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pyarrow as pa

from emkd.storage.index.table import write_parquet
from tests.storage.forged import Changes, forge
from tests.storage.use_all import WAYS, use_all

MEMORY = 2**30  # more than the process has at its start
NUMBERS = (0, 1, -1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e300)
VALUES = (*NUMBERS, True, None, "", "x", "\ud800", "..", "\x00", [], {}, [[]], ["x"], [-1, 2], {"x": 1})


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0 or not data:
        return data[: rng.randrange(len(data) + 1)]
    found = bytearray(data)
    if kind == 1:
        found += rng.randbytes(rng.randrange(1, 40))
    for _ in range(1 if kind == 2 else rng.randrange(1, 8)):
        at = rng.randrange(len(found))
        found[at] = rng.choice((0, 255, 127, found[at] ^ (1 << rng.randrange(8))))
    return bytes(found)


def places(value, path=()):
    """Where in a JSON value there is another value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, found in inner:
        yield from places(found, (*path, name))


def changed_json(value, rng: random.Random):
    """The value with one of its inner values replaced, or left out."""
    found = json.loads(json.dumps(value))
    path = rng.choice([place for place in places(found) if place])
    at = found
    for name in path[:-1]:
        at = at[name]
    old = at[path[-1]]
    if isinstance(at, dict) and rng.random() < 0.1:
        del at[path[-1]]
    elif type(old) in (int, float) and rng.random() < 0.7:
        at[path[-1]] = rng.choice((*NUMBERS, old + 1, old - 1, old * 1000))
    else:
        at[path[-1]] = rng.choice(VALUES)
    return found


def changed_table(table: pa.Table, rng: random.Random) -> pa.Table:
    """The table with a value of one row replaced; as it was if the new one is not of the column's type."""
    rows = table.to_pylist()
    row = rng.randrange(len(rows))
    rows[row] = changed_json(rows[row], rng)
    try:
        return pa.Table.from_pylist(rows, table.schema)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return table


def files_of(rng: random.Random, pattern: str, change):
    """A change of one file of a shard's folder."""

    def files(folder):
        file = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        file.write_bytes(change(file.read_bytes()))

    return files


def damage(path: Path, rng: random.Random) -> str:
    """Change the bytes of any file; hashes no longer fit."""
    file = rng.choice(sorted(found for found in path.rglob("*") if found.is_file()))
    file.write_bytes(changed_bytes(file.read_bytes(), rng))
    return f"bytes of {file.relative_to(path)}"


def stranger(path: Path, rng: random.Random) -> str:
    """Change anything, and make all hashes fit."""
    kinds = {
        "manifest": lambda: Changes(manifest=lambda value: changed_json(value, rng)),
        "table": lambda: Changes(table=lambda table: changed_table(table, rng)),
        "body": lambda: Changes(body=lambda value: changed_json(value, rng)),
        "seal": lambda: Changes(seal=lambda value: changed_json(value, rng)),
        "zarr": lambda: Changes(files=files_of(rng, "*/zarr.json", lambda data: json.dumps(changed_json(json.loads(data), rng)).encode())),
        "chunk": lambda: Changes(files=files_of(rng, "*/c/**/*", lambda data: changed_bytes(data, rng))),
        "parquet": lambda: Changes(write_index=lambda *given: changed_bytes(write_parquet(*given), rng)),
    }  # fmt: skip
    kind = rng.choice(sorted(kinds))
    forge(path, kinds[kind]())
    return kind


def run(cache: Path, seed: int, seconds: float) -> int:
    with tempfile.TemporaryDirectory() as folder:
        use_all(cache)  # what it imports and keeps is not counted
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        errors: Counter[str] = Counter()
        end, tries = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            rng, path = random.Random(f"{seed}-{tries}"), Path(folder) / str(tries)
            shutil.copytree(cache, path)
            what = "nothing"
            try:
                what = (damage if tries % 2 else stranger)(path, rng)
                errors.update(name for name in use_all(path, (WAYS[0], rng.choice(WAYS[1:]))) if name)
            except Exception:  # noqa: BLE001  it is what is looked for
                print(json.dumps({"try": tries, "seed": seed, "change": what, "error": traceback.format_exc()}))
                return 1
            shutil.rmtree(path)
            tries += 1
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps({"tries": tries, "errors": errors, "more_mib": round(more)}))
        return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
