"""Repair a cache: delete damaged objects, so that the job writes them again.

Intact shards are not touched, and a kill at any time is harmless: the seal is deleted first, so that a cache under
repair counts as not sealed, and the next run finds the same damage again.
"""

from collections.abc import Sequence

from emkd.errors import CacheConflictError, DamagedCacheError
from emkd.storage.basis import RESTORE, identify
from emkd.storage.index.commit import read_index
from emkd.storage.lifecycle.create import refuse
from emkd.storage.lifecycle.verify import Damage
from emkd.storage.manifest.conflicts import conflicts
from emkd.storage.manifest.manifest import LATER, Manifest
from emkd.storage.manifest.read import count_extensions, parse_extension, read_manifest
from emkd.storage.objects.digest import sha256_hex
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    basis_name,
    committed_shards,
    index_name,
    is_basis,
    plan_name,
    seal_name,
    shard_of_object,
    table_name,
)


def withdraw(
    files: Files,
    damages: Sequence[Damage],
    run: Manifest,
    tokenizer_json: bytes,
    older: Sequence[Manifest] = (),
) -> list[int]:
    """Delete the indexes of damaged shards, so that they are no longer committed, and return these shards.

    run, tokenizer_json: the manifest and the tokenizer of the same command; they replace damaged ones
    older: the same command's manifests in older formats, with the defaults that these had

    Raises CacheConflictError if `run` is not the run that created the cache, and DamagedCacheError if the plan of an
    extension or the basis of codes is damaged (only a copy restores them) or if an object cannot be read now (it may be
    intact). In all these cases nothing is changed.
    """
    if not damages:
        return []
    names, runs = {damage.name for damage in damages}, (run, *older)
    _check_readable(files, damages)
    _check_plans(files, damages)
    if MANIFEST_NAME in names:
        run = _same_run(files, runs, names)
    else:
        manifest = read_manifest(files)
        run = next((run for run in runs if not conflicts(manifest, run)), runs[0])
        refuse(files, conflicts(manifest, run))
    if sha256_hex(tokenizer_json) != run.tokenizer.sha256:
        raise ValueError("tokenizer_json is not the tokenizer of the run's manifest")
    shards = sorted({shard for shard in map(shard_of_object, names) if shard is not None})
    extension = count_extensions(files)
    files.delete(seal_name(extension))
    files.delete(table_name(extension))
    if MANIFEST_NAME in names:
        files.replace(MANIFEST_NAME, run.to_bytes())
    if TOKENIZER_NAME in names:
        files.replace(TOKENIZER_NAME, tokenizer_json)
    for shard in shards:
        files.delete(index_name(shard))
    return shards


def _check_readable(files: Files, damages: Sequence[Damage]) -> None:
    """Raise DamagedCacheError if the disk fails or permissions are missing: the object itself may be intact."""
    for damage in damages:
        try:
            files.read(damage.name)
        except DamagedCacheError as error:
            raise DamagedCacheError(
                f"{files.where(damage.name)} cannot be read now, but may be intact: nothing was changed. Fix the disk "
                f"or the permissions, or delete the file to have it written again ({error.__cause__})"
            ) from error


def _check_plans(files: Files, damages: Sequence[Damage]) -> None:
    """Raise DamagedCacheError if the plan of an extension or the basis of codes is damaged."""
    for damage in damages:
        if damage.name.endswith("/plan.json"):
            raise DamagedCacheError(
                f"{files.where(damage.name)}: {damage.what}. The plan of an extension cannot be rebuilt from the other "
                "files: restore it from a copy; or, if it is the newest plan, delete its folder and add the same data "
                "again with --extend, which makes the same plan and computes nothing twice"
            )
        if is_basis(damage.name):
            raise DamagedCacheError(f"{files.where(damage.name)}: {damage.what}. {RESTORE}")


def _same_run(files: Files, runs: Sequence[Manifest], damaged: set[str]) -> Manifest:
    """Return the manifest that replaces a damaged one.

    It is that of the run, with a basis that the folder has, or as an older version of emkd would have written it for
    the same run: without later fields, or in an older format. The indexes of the first plan's shards and the first
    extension name its hash. Raises CacheConflictError if they name the hash of another run, and DamagedCacheError if
    the basis is missing, too.
    """
    first = parse_extension(files, 1) if count_extensions(files) else None
    named = {} if first is None else {plan_name(1): first.parent_sha256}
    for shard in committed_shards(files):
        if index_name(shard) not in damaged and (first is None or shard < first.first_shard):
            named[index_name(shard)] = read_index(files, shard).settings_sha256
    formats = [manifest for run in runs for manifest in _formats(files, run)]
    for manifest in (form for later in formats for form in _earlier(later)):
        if named and set(named.values()) == {manifest.settings_sha256}:
            return manifest
    if runs[0].codes is not None and not _formats(files, runs[0]):
        where = files.where(MANIFEST_NAME)
        raise DamagedCacheError(f"{where} is damaged, and the basis of its codes is missing. {RESTORE}")
    for name, settings_sha256 in named.items():
        if settings_sha256 not in {manifest.settings_sha256 for manifest in formats}:
            raise CacheConflictError(
                f"{files.where(MANIFEST_NAME)} is damaged, and {files.where(name)} was written with settings or data "
                "that differ from this run's; run exactly the command that created the cache again, with --repair"
                + ("" if runs[0].clock is None else " and, as --clock, the day on which it was first run")
            )
    return formats[0]


def _earlier(manifest: Manifest) -> list[Manifest]:
    """Return a manifest as it is, and as it was written before each of the fields that came later."""
    return [manifest.without(*list(LATER)[:n]) for n in range(len(LATER) + 1)]


def _formats(files: Files, run: Manifest) -> list[Manifest]:
    """Return the manifest of a run in each format that can express it, newest first.

    Its basis, if it has codes, is one that the folder has.
    """
    if run.codes is None:
        return [run.in_format(version) for version in range(run.format_version, 0, -1)]
    found = [(name, files.read(name) or b"") for name in files.names() if is_basis(name)]
    identities = [identify(data) for name, data in found if name == basis_name(sha256_hex(data))]
    return [run.with_basis(identity) for identity in identities if identity is not None]
