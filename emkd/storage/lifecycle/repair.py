"""What is damaged leaves the cache, so that the job makes it anew.

Nothing that is whole is touched, and the order keeps a kill harmless: the seal goes first, so that a cache that
is being repaired counts as not sealed, and the next run finds again what is damaged.
"""

from collections.abc import Sequence

from emkd.errors import CacheConflictError, DamagedCacheError
from emkd.storage.index.commit import read_index
from emkd.storage.lifecycle.create import refuse
from emkd.storage.lifecycle.verify import Damage
from emkd.storage.manifest.conflicts import conflicts
from emkd.storage.manifest.manifest import FORMAT_VERSION, Manifest
from emkd.storage.manifest.read import count_extensions, parse_extension, read_manifest
from emkd.storage.objects.digest import sha256_hex
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    committed_shards,
    index_name,
    plan_name,
    seal_name,
    shard_of_object,
    table_name,
)


def withdraw(files: Files, damages: Sequence[Damage], run: Manifest, tokenizer_json: bytes) -> list[int]:
    """Withdraw the commits of damaged shards and make anew what `run` can: their numbers.

    run, tokenizer_json: what the same command writes; they take the place of a damaged manifest and tokenizer.
    CacheConflictError where `run` is not the run that made the cache; DamagedCacheError where the plan of an
    extension is damaged, which only a copy brings back, or where an object cannot be read now: it may be whole.
    Nothing is changed in any of these cases.
    """
    if not damages:
        return []
    names = {damage.name for damage in damages}
    _check_readable(files, damages)
    _check_plans(files, damages)
    if MANIFEST_NAME in names:
        run = _same_run(files, run, names)
    else:
        refuse(files, conflicts(read_manifest(files), run))
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
    """A disk that fails or a permission that is missing says nothing of what was written."""
    for damage in damages:
        try:
            files.read(damage.name)
        except DamagedCacheError as error:
            raise DamagedCacheError(
                f"{files.where(damage.name)} cannot be read now, and may be whole: nothing was withdrawn. Mend the "
                f"disk or the permissions, or delete the file to have it made anew ({error.__cause__})"
            ) from error


def _check_plans(files: Files, damages: Sequence[Damage]) -> None:
    for damage in damages:
        if damage.name.endswith("/plan.json"):
            raise DamagedCacheError(
                f"{files.where(damage.name)}: {damage.what}. The plan of an extension cannot be made anew from the "
                "rest: restore it from a copy; or, where it is the newest one, remove its folder and add the same data "
                "again with --extend, which makes the same plan and computes nothing twice"
            )


def _same_run(files: Files, run: Manifest, damaged: set[str]) -> Manifest:
    """The manifest that takes the place of a damaged one: the run's, or that with which an older version would have
    begun the cache, without the chat template or in an older format. The first plan's shards were written under it,
    and the first extension extends it.
    """
    first = parse_extension(files, 1) if count_extensions(files) else None
    named = {} if first is None else {plan_name(1): first.parent_sha256}
    for shard in committed_shards(files):
        if index_name(shard) not in damaged and (first is None or shard < first.first_shard):
            named[index_name(shard)] = read_index(files, shard).settings_sha256
    formats = [run.in_format(version) for version in range(FORMAT_VERSION, 0, -1)]
    for manifest in (*formats, *(older.without_chat_template() for older in formats)):
        if named and set(named.values()) == {manifest.settings_sha256}:
            return manifest
    for name, settings_sha256 in named.items():
        if settings_sha256 != run.settings_sha256:
            raise CacheConflictError(
                f"{files.where(MANIFEST_NAME)} is damaged, and {files.where(name)} was written with other settings or "
                "data than those of this run; repeat the very command that began the cache, with --repair"
            )
    return run
