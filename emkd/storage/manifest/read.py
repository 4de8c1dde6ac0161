"""What a cache says of itself, read from disk: manifest.json and the plans of its extensions.

    extensions/<e>/plan.json      which rows were added (`plan.Extension`), an envelope (see `digest`), created only
                                  if absent
    extensions/<e>/index.parquet  extensions/<e>/seal.json    as at the root, for all rows up to this extension

The newest plan decides what is in the cache; its seal, once it is there, vouches for everything before it.
"""

import json
from collections.abc import Callable

from pydantic import ValidationError

from emkd.errors import DamagedCacheError, InputNotFoundError
from emkd.storage.manifest.manifest import RESTORE_MANIFEST, Manifest
from emkd.storage.manifest.plan import Extension
from emkd.storage.objects.digest import open_envelope, seal_envelope
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import MANIFEST_NAME, committed_shards, extension_of, plan_name, seal_name

_RESTORE = "restore the file from a copy of the cache"


def described_names(manifest: Manifest) -> list[str]:
    """Names of the files that a manifest in memory was read from."""
    return [MANIFEST_NAME, *(plan_name(extension.number) for extension in manifest.extensions)]


def count_extensions(files: Files) -> int:
    """How many extensions a cache has. DamagedCacheError where a plan is gone of which other files are left."""
    number, missing = extensions_and_missing_plans(files)
    if missing:
        raise DamagedCacheError(f"{files.where(missing[0])}: missing; {_RESTORE}")
    return number


def extensions_and_missing_plans(files: Files) -> tuple[int, list[str]]:
    """The number of the newest extension, and names of plans that are gone though something was added after them."""
    names = set(files.names("extensions"))
    newest = max((number for number in map(extension_of, names) if number is not None), default=0)
    return newest, [plan_name(n) for n in range(1, newest + 1) if plan_name(n) not in names]


def is_cache(files: Files) -> bool:
    """Whether a cache is there, be it damaged. One whose manifest is gone has commits, seals or plans."""
    return (
        files.exists(MANIFEST_NAME)
        or files.exists(seal_name(0))
        or bool(committed_shards(files))
        or extensions_and_missing_plans(files)[0] > 0
    )


def read_manifest(files: Files, read: Callable[[str], bytes] | None = None, extensions: int | None = None) -> Manifest:
    """The manifest with the extensions of a cache, all of them or so many as are named. `read` reads an object
    whole (a seal's `check`, say).

    InputNotFoundError where there is no cache; CacheVersionError; DamagedCacheError naming the file.
    """
    if not is_cache(files):
        raise InputNotFoundError(
            f"no cache at {files.root}: it has no {MANIFEST_NAME}; make one with `emkd cache-teacher`"
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
                f"{where}: does not extend this cache: it is number {extension.number} of another one, or what it "
                f"extends was changed; {_RESTORE}"
            )
        manifest = manifest.model_copy(update={"extensions": (*manifest.extensions, extension)})
    return manifest


def extension_bytes(extension: Extension) -> bytes:
    """The content of plan.json. It vouches for itself: what it keeps of the cache is written nowhere else."""
    envelope = seal_envelope(extension.model_dump(mode="json"))
    return json.dumps(envelope, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_extension(files: Files, number: int, data: bytes | None = None) -> Extension:
    """The plan of an extension, from its file or from the `data` read there. DamagedCacheError where it is changed."""
    where = files.where(plan_name(number))
    data = files.read(plan_name(number)) or b"" if data is None else data
    try:
        return Extension.model_validate(open_envelope(where, data))
    except DamagedCacheError as error:
        raise DamagedCacheError(f"{where}: content changed, it does not match its own hash; {_RESTORE}") from error
    except ValidationError as error:
        raise DamagedCacheError(f"{where}: not the plan of an extension: {error}; {_RESTORE}") from error
