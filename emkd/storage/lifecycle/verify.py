"""Read and check every byte of a cache, and say what is damaged.

Nothing is raised for damage: all of it is listed. The order is that of trust: the seal, what the seal
vouches for, and then each shard by its own index.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emkd.errors import DamagedCacheError, InputNotFoundError
from emkd.storage.index.commit import read_index
from emkd.storage.lifecycle.seal import Seal, check_tokenizer, read_committed, read_seal
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import (
    described_names,
    extensions_and_missing_plans,
    is_cache,
    parse_extension,
    read_manifest,
)
from emkd.storage.objects.digest import ObjectDigest, describe_damage
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    committed_shards,
    index_name,
    indexed_shard,
    plan_name,
    seal_name,
)
from emkd.storage.objects.open import open_files


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
    if not is_cache(files):
        raise InputNotFoundError(f"no cache at {files.root}: it has no {MANIFEST_NAME}")
    return list(_damages(files, progress or (lambda n_bytes: None), arrays))


def _damages(files: Files, progress: Callable[[int], None], arrays: bool) -> Iterator[Damage]:
    committed = committed_shards(files)  # before the plans: a shard is planned before it is committed
    extension, missing = extensions_and_missing_plans(files)
    seal, damages = _seal_damages(files, extension)
    known = {damage.name for damage in damages}
    damages += [Damage(name=name, what="missing") for name in missing if name not in known]
    if not damages and seal is None:
        damages += _unsealed_damages(files)
    known = {damage.name for damage in damages}
    manifest = None if known & {MANIFEST_NAME, *map(plan_name, range(1, extension + 1))} else read_manifest(files)
    yield from damages
    if manifest is not None and committed and committed[-1] >= manifest.n_planned:
        yield Damage(name=plan_name(extension + 1), what=f"missing: {index_name(committed[-1])} is of no other plan")
    for shard in _shards(committed, seal, manifest):
        if index_name(shard) not in known:
            yield from _shard_damages(files, shard, manifest, progress, arrays)


def _seal_damages(files: Files, extension: int) -> tuple[Seal | None, list[Damage]]:
    """The seal, if it can be trusted, and what is wrong with it and the objects that it vouches for."""
    try:
        seal = read_seal(files, extension)
    except DamagedCacheError as error:
        return None, [Damage(name=seal_name(extension), what=str(error)), *_unsealed_damages(files)]
    if seal is None:
        return None, []
    found = {name: _damage_of(files, name, o.digest) for name, o in seal.objects.items()}
    return seal, [Damage(name=name, what=what) for name, what in found.items() if what is not None]


def _damage_of(files: Files, name: str, expected: ObjectDigest) -> str | None:
    try:
        return describe_damage(files.read(name), expected)
    except DamagedCacheError as error:  # the disk does not give it back
        return str(error)


def _unsealed_damages(files: Files) -> list[Damage]:
    """What is wrong with manifest, plans and tokenizer, as far as they vouch for one another without a seal."""
    reading = [MANIFEST_NAME]

    def read(name: str) -> bytes:
        reading.append(name)
        return files.read(name) or b""

    try:
        manifest = read_manifest(files, read)
    except (DamagedCacheError, InputNotFoundError) as error:
        odd = _odd_one(files, read_manifest(files, extensions=0)) if reading[-1] == plan_name(1) else None
        return [Damage(name=odd or reading[-1], what=str(error))]
    odd = _odd_one(files, manifest)
    if odd is not None:
        return [Damage(name=odd, what="content changed: what was written under it names another one")]
    if not files.exists(TOKENIZER_NAME) and not committed_shards(files):
        return []  # the job that makes it is at its very beginning
    try:
        check_tokenizer(files, manifest)
    except DamagedCacheError as error:
        return [Damage(name=TOKENIZER_NAME, what=str(error))]
    return []


def _odd_one(files: Files, manifest: Manifest) -> str | None:
    """The manifest or the plan that all the shards written under it, and a plan that extends it, know otherwise:
    then it is that one that was changed, not all of them."""
    for number, (name, sha256) in enumerate(zip(described_names(manifest), manifest.plan_hashes, strict=True)):
        shards = manifest.extensions[number - 1].shards if number else range(manifest.plan.n_shards)
        known = list(_known_hashes(files, set(committed_shards(files)) & set(shards), number == 0))
        if known and sha256 not in known:
            return name
    return None


def _known_hashes(files: Files, shards: set[int], extended: bool) -> Iterator[str]:
    if extended and files.exists(plan_name(1)):
        with contextlib.suppress(DamagedCacheError):
            yield parse_extension(files, 1).parent_sha256
    for shard in sorted(shards):
        with contextlib.suppress(DamagedCacheError):
            yield read_index(files, shard).settings_sha256


def _shards(committed: list[int], seal: Seal | None, manifest: Manifest | None) -> list[int]:
    """The shards that have to be as they were written. What is committed and in no plan is not in the cache."""
    if seal is not None:
        return sorted(shard for shard in map(indexed_shard, seal.objects) if shard is not None)
    return committed if manifest is None else sorted(set(committed) & set(manifest.shards))


def _shard_damages(
    files: Files, shard: int, manifest: Manifest | None, progress: Callable[[int], None], arrays: bool
) -> Iterator[Damage]:
    """Of a shard's index and objects. Without a manifest to trust, the index has only itself to match."""
    try:
        index = read_index(files, shard) if manifest is None else read_committed(files, shard, manifest)
    except DamagedCacheError as error:
        yield Damage(name=index_name(shard), what=str(error))
        return
    for key, expected in index.objects.items() if arrays else ():
        name = f"{index.prefix}/{key}"
        what = _damage_of(files, name, expected)
        progress(expected.n_bytes)
        if what is not None:
            yield Damage(name=name, what=what)
