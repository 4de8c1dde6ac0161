"""Read the manifest, the plans of the extensions and the tokenizer of a cache.

    extensions/<e>/plan.json      which rows were added (`plan.Extension`): an envelope (see `digest`), created only
                                  if absent
    extensions/<e>/index.parquet  extensions/<e>/seal.json    as at the root, for all rows up to this extension

The newest plan decides which shards are in the cache; its seal, once written, covers the earlier plans, too.
"""

import json
from collections.abc import Callable

from pydantic import ValidationError

from emkd.errors import DamagedCacheError, InputNotFoundError
from emkd.storage.manifest.manifest import RESTORE_MANIFEST, Manifest
from emkd.storage.manifest.plan import Extension
from emkd.storage.objects.checked import read_existing
from emkd.storage.objects.digest import NEXT_STEP, open_envelope, seal_envelope, sha256_hex
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    basis_name,
    committed_shards,
    extension_of,
    plan_name,
    seal_name,
)

_RESTORE = "restore the file from a copy of the cache"


def manifest_files(manifest: Manifest) -> list[str]:
    """Return the names of the files that a manifest in memory was read from: manifest.json and each plan.json."""
    return [MANIFEST_NAME, *(plan_name(extension.number) for extension in manifest.extensions)]


def basis_files(manifest: Manifest) -> list[str]:
    """Return the name of the basis of codes, in a list that is empty if the cache has none."""
    return [] if manifest.basis is None else [basis_name(manifest.basis.sha256)]


def count_extensions(files: Files) -> int:
    """Return the number of extensions of a cache.

    Raises DamagedCacheError if a plan is missing although its extension has other files or a later extension exists.
    """
    newest, missing = extensions_and_missing_plans(files)
    if missing:
        raise DamagedCacheError(f"{files.where(missing[0])}: missing; {_RESTORE}")
    return newest


def extensions_and_missing_plans(files: Files) -> tuple[int, list[str]]:
    """Return the newest extension that has any file (0 if there is none), and the names of plans up to it that are
    missing."""
    names = set(files.names("extensions"))
    newest = max((number for number in map(extension_of, names) if number is not None), default=0)
    return newest, [plan_name(n) for n in range(1, newest + 1) if plan_name(n) not in names]


def is_cache(files: Files) -> bool:
    """Return whether there is a cache, possibly damaged: one without a manifest still has indexes, seals or plans."""
    return (
        files.exists(MANIFEST_NAME)
        or files.exists(seal_name(0))
        or bool(committed_shards(files))
        or extensions_and_missing_plans(files)[0] > 0
    )


def read_manifest(files: Files, read: Callable[[str], bytes] | None = None, extensions: int | None = None) -> Manifest:
    """Read the manifest of a cache, with its extensions.

    read:       reads a whole object, for instance with a seal's `check`; `files.read` by default
    extensions: number of extensions to read; all of them by default

    Raises InputNotFoundError if there is no cache, CacheVersionError if it is of a newer format, and DamagedCacheError,
    which names the file, if a file is missing or not as it was written.
    """
    if not is_cache(files):
        raise InputNotFoundError(
            f"no cache at {files.root}: it has no {MANIFEST_NAME}; create one with `emkd cache-teacher`"
        )
    read = read or (lambda name: files.read(name) or b"")
    data = read(MANIFEST_NAME)
    if not data:
        raise DamagedCacheError(f"{files.where(MANIFEST_NAME)}: missing or empty; {RESTORE_MANIFEST}")
    manifest = Manifest.from_bytes(data, files.where(MANIFEST_NAME))
    for number in range(1, 1 + (count_extensions(files) if extensions is None else extensions)):
        where = files.where(plan_name(number))
        extension = parse_extension(files, number, read(plan_name(number)))
        if (extension.number, extension.parent_sha256) != (number, manifest.plan_sha256):
            raise DamagedCacheError(
                f"{where}: does not extend this cache: it is extension {extension.number} of another one, or the "
                f"manifest or plan that it extends was changed; {_RESTORE}"
            )
        manifest = manifest.model_copy(update={"extensions": (*manifest.extensions, extension)})
    return manifest


def extension_bytes(extension: Extension) -> bytes:
    """Return the content of plan.json: an envelope with its own hash, since no other file repeats what it says."""
    envelope = seal_envelope(extension.model_dump(mode="json"))
    return json.dumps(envelope, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_extension(files: Files, number: int, data: bytes | None = None) -> Extension:
    """Parse the plan of an extension.

    data: the content of its file; read here by default

    Raises DamagedCacheError if it is not as it was written.
    """
    where = files.where(plan_name(number))
    data = files.read(plan_name(number)) or b"" if data is None else data
    try:
        return Extension.model_validate(open_envelope(where, data))
    except DamagedCacheError as error:
        raise DamagedCacheError(f"{where}: content changed, it does not match its own hash; {_RESTORE}") from error
    except (ValidationError, ValueError, RecursionError) as error:
        raise DamagedCacheError(f"{where}: not the plan of an extension: {error}; {_RESTORE}") from error


def read_tokenizer(files: Files, manifest: Manifest) -> bytes:
    """Read tokenizer.json. Raises DamagedCacheError if it is missing or not the tokenizer of the manifest."""
    data = read_existing(files, TOKENIZER_NAME)
    if sha256_hex(data) != manifest.tokenizer.sha256:
        where = files.where(TOKENIZER_NAME)
        raise DamagedCacheError(f"{where}: content changed, it is not the tokenizer of the manifest. {NEXT_STEP}")
    return data
