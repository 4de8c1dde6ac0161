"""Read and check every byte of a cache, and say what is damaged.

Nothing is raised for damage: all of it is listed. The order is that of trust: the seal, what the seal
vouches for, and then each shard by its own index.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emkd.errors import DamagedCacheError, InputNotFoundError
from emkd.storage.digest import describe_damage
from emkd.storage.files import LocalFiles, open_files
from emkd.storage.index import committed_shards, index_name, read_index
from emkd.storage.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest
from emkd.storage.seal import SEAL_NAME, Seal, read_committed, read_seal


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One object that is not as it was written: its name in the cache, and what is wrong with it."""

    name: str
    what: str


def verify(uri: str | Path, progress: Callable[[int], None] | None = None, *, arrays: bool = True) -> list[Damage]:
    """Everything that is damaged in a cache, sealed or not; an empty list where nothing is.

    `progress` is called with the bytes of each object of a shard once it is checked. Without `arrays` the
    objects of shards are left out: only what describes them is read. InputNotFoundError where there is no
    cache; CacheVersionError where it is of a newer format. A shard that is not committed yet is no damage;
    one that is gone from a sealed cache is.
    """
    files = open_files(uri)
    if not files.exists(MANIFEST_NAME) and not files.exists(SEAL_NAME):
        raise InputNotFoundError(f"no cache at {files.root}: it has no {MANIFEST_NAME}")
    return list(_damages(files, progress or (lambda n_bytes: None), arrays))


def _damages(files: LocalFiles, progress: Callable[[int], None], arrays: bool) -> Iterator[Damage]:
    seal, damages = _seal_damages(files)
    yield from damages
    known = {damage.name for damage in damages}
    manifest = None
    if MANIFEST_NAME not in known:
        try:
            manifest = Manifest.from_bytes(files.read(MANIFEST_NAME) or b"", files.where(MANIFEST_NAME))
        except DamagedCacheError as error:
            yield Damage(name=MANIFEST_NAME, what=str(error))
    for shard in committed_shards(files) if seal is None else range(seal.n_shards):
        if index_name(shard) not in known:
            yield from _shard_damages(files, shard, manifest, progress, arrays)


def _seal_damages(files: LocalFiles) -> tuple[Seal | None, list[Damage]]:
    """The seal, if it can be trusted, and what is wrong with it and the objects that it vouches for."""
    try:
        seal = read_seal(files)
    except DamagedCacheError as error:
        return None, [Damage(name=SEAL_NAME, what=str(error))]
    if seal is None:
        missing = [] if files.exists(TOKENIZER_NAME) else [Damage(name=TOKENIZER_NAME, what="missing")]
        return None, missing
    found = {name: describe_damage(files.read(name), o.digest) for name, o in seal.objects.items()}
    return seal, [Damage(name=name, what=what) for name, what in found.items() if what is not None]


def _shard_damages(
    files: LocalFiles, shard: int, manifest: Manifest | None, progress: Callable[[int], None], arrays: bool
) -> Iterator[Damage]:
    """Of a shard's index and objects. Without a manifest to trust, the index has only itself to match."""
    try:
        index = read_index(files, shard) if manifest is None else read_committed(files, shard, manifest)
    except (DamagedCacheError, ValueError) as error:  # ValueError: a shard that the plan does not have
        yield Damage(name=index_name(shard), what=str(error))
        return
    for key, expected in index.objects.items() if arrays else ():
        name = f"{index.prefix}/{key}"
        what = describe_damage(files.read(name), expected)
        progress(expected.n_bytes)
        if what is not None:
            yield Damage(name=name, what=what)
