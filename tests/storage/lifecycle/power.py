"""What a power cut would leave: a model of a disk that forgets everything that was not synced.

    python -m tests.storage.lifecycle.power FOLDER [NAME]     NAME: a method of LocalFiles that is made to do nothing

A file's bytes are safe as they were when it was last synced, a name is safe when its folder was synced. At every link
of a manifest, plan, index or seal, every object whose hash it holds must be safe: bytes, name, and the names of all
folders above it. The jobs of `killed` run to the end, then are killed at every operation outside of a shard's folder,
and run again. Prints what was not safe, and the number of links that were checked, as JSON.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from emkd.storage.index.commit import ShardIndex
from emkd.storage.manifest.read import parse_extension, read_manifest
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import index_name, indexed_shard
from emkd.storage.objects.open import open_files
from tests.storage.lifecycle.killed import SCENARIOS, Scenario
from tests.storage.lifecycle.operations import Operation, watch


class Killed(BaseException):
    """The process is dead: nothing that it does from now on has an effect."""


class Disk:
    """bytes: of each file as it was last synced; entries: of each folder as it was last synced."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.bytes: dict[int, bytes] = {}  # by inode: a link is another name of the same bytes
        self.entries: dict[str, dict[str, int]] = {}
        self.unsafe: list[str] = []
        self.n_links = self.n_operations = 0
        self.die_at: int | None = None
        self.list_of_operations: list[str] = []
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            self.synced(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

        os.fsync = noted
        watch(str(base), self.act)

    def synced(self, path: Path) -> None:
        if path.is_dir():
            self.entries[str(path)] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.bytes[path.stat().st_ino] = path.read_bytes()

    def act(self, operation: Operation) -> None:
        if "/shards/" not in operation.path:
            self.n_operations += 1
        if self.die_at is not None and self.n_operations >= self.die_at:
            raise Killed
        if operation.kind == "os.link":
            self.check_link(Path(operation.path))

    def check_link(self, target: Path) -> None:
        """Check before an object gets its name, while it is in a partial file in the same folder."""
        root = next(folder for folder in target.parents if folder.parent == self.base)
        name, files = target.relative_to(root).as_posix(), LocalFiles(root)
        partial = max(target.parent.glob(f".{target.name}.*.partial"), key=lambda path: path.stat().st_mtime_ns)
        self.n_links += 1
        if self.bytes.get(partial.stat().st_ino) != partial.read_bytes():
            self.unsafe.append(f"{name}: its own bytes")
        for folder in [target.parent, *target.parent.parents]:
            if folder == self.base:
                break
            self.check_name(name, folder)
        for vouched in vouched_for(files, name, partial.read_bytes()):
            self.check_safe(name, root / vouched)

    def check_safe(self, by: str, path: Path) -> None:
        if self.bytes.get(path.stat().st_ino) != path.read_bytes():
            self.unsafe.append(f"{by}: the bytes of {path.name}")
        for part in [path, *path.parents]:
            if part == self.base:
                return
            self.check_name(by, part)

    def check_name(self, by: str, path: Path) -> None:
        if self.entries.get(str(path.parent), {}).get(path.name) != path.stat().st_ino:
            self.unsafe.append(f"{by}: the name {path.relative_to(self.base)}")


def vouched_for(files: LocalFiles, name: str, data: bytes) -> Iterator[str]:
    """Names of the files whose hashes an object holds."""
    shard = indexed_shard(name)
    if shard is not None:
        index = ShardIndex.from_bytes(name, data)
        yield from (f"{index.prefix}/{key}" for key in index.objects)
        source = read_manifest(files).source(shard)
        yield "manifest.json" if source == 0 else f"extensions/{source:06d}/plan.json"
    elif name.endswith("seal.json"):
        yield from json.loads(data)["body"]["objects"]
    elif name.endswith("plan.json"):
        yield "manifest.json"
        kept = parse_extension(files, 1, data).kept
        yield from (index_name(n) for first, last in kept for n in range(first, last))


def run(disk: Disk, scenario: Scenario, name: str, die_at: int | None) -> int:
    """One run to the end, or a kill and a run to the end. Returns the number of operations of the first run."""
    cache = disk.base / name
    disk.die_at = None
    if scenario.begin is not None:
        scenario.begin(str(cache))
    disk.n_operations, disk.die_at = 0, die_at
    try:
        scenario.run(str(cache))
    except Killed:
        disk.die_at = None
        scenario.run(str(cache))
    n = disk.n_operations
    files = open_files(cache)
    for left in files.names():
        if not left.startswith("shards/"):
            disk.check_safe("in the end", cache / left)
    return n


def main(base: Path, without: str | None) -> None:
    if without is not None:
        setattr(LocalFiles, without, lambda *_: None)
    disk = Disk(base)
    counts = {}
    for name in ("fresh", "extend"):
        counts[name] = run(disk, SCENARIOS[name], name, None)
        for n in range(1, 1 + counts[name]):
            run(disk, SCENARIOS[name], f"{name}-{n}", n)
    print(json.dumps({"unsafe": disk.unsafe, "links": disk.n_links, "deaths": counts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else None)
