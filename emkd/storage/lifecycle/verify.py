"""Read and check every byte of a cache, and list the damage.

Damage raises no error: all of it is listed. The order follows the hashes: the seal, the objects whose hashes the seal
holds, and then each shard by its own index.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emkd.errors import DamagedCacheError, InputNotFoundError
from emkd.storage.basis import read_basis
from emkd.storage.index.commit import read_index
from emkd.storage.index.committed import read_committed
from emkd.storage.lifecycle.seal import Seal, read_seal
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import (
    extensions_and_missing_plans,
    is_cache,
    manifest_files,
    parse_extension,
    read_manifest,
    read_tokenizer,
)
from emkd.storage.objects.digest import ObjectDigest, describe_damage
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    basis_name,
    committed_shards,
    index_name,
    indexed_shard,
    plan_name,
    seal_name,
)
from emkd.storage.objects.open import open_files


@dataclass(frozen=True, kw_only=True)
class Damage:
    """An object that is not as it was written. name: in the cache;  what: a description of the damage"""

    name: str
    what: str


def verify(uri: str | Path, progress: Callable[[int], None] | None = None, *, arrays: bool = True) -> list[Damage]:
    """Return all damaged objects of a cache, sealed or not; an empty list if there are none.

    progress: called with the size in bytes of each object of a shard after it was checked
    arrays:   also check the objects of shards; without it, only their indexes and the files beside them are read

    A shard that is not committed yet is not damage; one that is missing from a sealed cache is. Raises
    InputNotFoundError if there is no cache, and CacheVersionError if it is of a newer format.
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
        yield Damage(name=plan_name(extension + 1), what=f"missing: {index_name(committed[-1])} is in no other plan")
    for shard in _shards(committed, seal, manifest):
        if index_name(shard) not in known:
            yield from _shard_damages(files, shard, manifest, progress, arrays)


def _seal_damages(files: Files, extension: int) -> tuple[Seal | None, list[Damage]]:
    """Return the seal, if it is intact, and the damage of the seal and of the objects whose hashes it holds."""
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
    except DamagedCacheError as error:  # the disk or the permissions do not let it be read
        return str(error)


def _unsealed_damages(files: Files) -> list[Damage]:
    """Return the damage of manifest, plans and tokenizer, as far as the hashes in them show it without a seal."""
    reading = [MANIFEST_NAME]

    def read(name: str) -> bytes:
        reading.append(name)
        return files.read(name) or b""

    try:
        manifest = read_manifest(files, read)
    except (DamagedCacheError, InputNotFoundError) as error:
        changed = _changed_plan(files, read_manifest(files, extensions=0)) if reading[-1] == plan_name(1) else None
        return [Damage(name=changed or reading[-1], what=str(error))]
    changed = _changed_plan(files, manifest)
    if changed is not None:
        return [Damage(name=changed, what="content changed: the files written under it name another hash")]
    if not files.exists(TOKENIZER_NAME) and not committed_shards(files):
        return _basis_damages(files, manifest)  # the job that creates the cache has not written the tokenizer yet
    damages = []
    try:
        read_tokenizer(files, manifest)
    except DamagedCacheError as error:
        damages.append(Damage(name=TOKENIZER_NAME, what=str(error)))
    return [*damages, *_basis_damages(files, manifest)]


def _basis_damages(files: Files, manifest: Manifest) -> list[Damage]:
    """Return the damage of the basis of codes, if there is one; the manifest has its hash."""
    if manifest.basis is None:
        return []
    try:
        read_basis(files, manifest.basis)
    except DamagedCacheError as error:
        return [Damage(name=basis_name(manifest.basis.sha256), what=str(error))]
    return []


def _changed_plan(files: Files, manifest: Manifest) -> str | None:
    """Return the name of a manifest or plan whose hash no file that refers to it has, None if there is none.

    If all shards written under it, and a plan that extends it, name another hash, then it was changed, not they.
    """
    for source, (name, sha256) in enumerate(zip(manifest_files(manifest), manifest.plan_hashes, strict=True)):
        shards = manifest.extensions[source - 1].shards if source else range(manifest.plan.n_shards)
        known = list(_known_hashes(files, set(committed_shards(files)) & set(shards), source == 0))
        if known and sha256 not in known:
            return name
    return None


def _known_hashes(files: Files, shards: set[int], extended: bool) -> Iterator[str]:
    """Yield the hash of a plan that its shards name, and for the manifest (`extended`) also its first extension."""
    if extended and files.exists(plan_name(1)):
        with contextlib.suppress(DamagedCacheError):
            yield parse_extension(files, 1).parent_sha256
    for shard in sorted(shards):
        with contextlib.suppress(DamagedCacheError):
            yield read_index(files, shard).settings_sha256


def _shards(committed: list[int], seal: Seal | None, manifest: Manifest | None) -> list[int]:
    """Return the shards to check. A committed shard that is in no plan is not part of the cache."""
    if seal is not None:
        return sorted(shard for shard in map(indexed_shard, seal.objects) if shard is not None)
    return committed if manifest is None else sorted(set(committed) & set(manifest.shards))


def _shard_damages(
    files: Files, shard: int, manifest: Manifest | None, progress: Callable[[int], None], arrays: bool
) -> Iterator[Damage]:
    """Yield the damage of a shard's index and objects. Without an intact manifest, the index is checked alone."""
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
