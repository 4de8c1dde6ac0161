"""What a cache says of itself, read from disk: manifest.json and the plans of its extensions.

    extensions/<e>/plan.json      which rows were added (`plan.Extension`), created only if absent
    extensions/<e>/index.parquet  extensions/<e>/seal.json    as at the root, for all rows up to this extension

The newest plan decides what is in the cache; its seal, once it is there, vouches for everything before it.
"""

import json
import re
from collections.abc import Callable

from pydantic import ValidationError

from emkd.errors import DamagedCacheError, InputNotFoundError
from emkd.storage.files import LocalFiles
from emkd.storage.manifest import MANIFEST_NAME, Manifest
from emkd.storage.plan import Extension

_OBJECT = re.compile(r"extensions/(\d{6})/.+")
_RESTORE = "restore the file from a copy of the cache"


def plan_name(extension: int) -> str:
    return f"extensions/{extension:06d}/plan.json"


def seal_name(extension: int) -> str:
    """The seal of a cache with so many extensions."""
    return f"extensions/{extension:06d}/seal.json" if extension else "seal.json"


def table_name(extension: int) -> str:
    """The consolidated index of a cache with so many extensions."""
    return f"extensions/{extension:06d}/index.parquet" if extension else "index.parquet"


def count_extensions(files: LocalFiles) -> int:
    """How many extensions a cache has. DamagedCacheError where a plan is gone of which other files are left."""
    number, missing = extensions_and_missing_plans(files)
    if missing:
        raise DamagedCacheError(f"{files.where(missing[0])}: missing; {_RESTORE}")
    return number


def extensions_and_missing_plans(files: LocalFiles) -> tuple[int, list[str]]:
    """The number of the newest extension, and names of plans that are gone though something was added after them."""
    names = set(files.names("extensions"))
    newest = max((int(match[1]) for match in map(_OBJECT.fullmatch, names) if match), default=0)
    return newest, [plan_name(n) for n in range(1, newest + 1) if plan_name(n) not in names]


def read_manifest(files: LocalFiles, read: Callable[[str], bytes] | None = None) -> Manifest:
    """The manifest with the extensions of a cache. `read` reads an object whole (a seal's `check`, say).

    InputNotFoundError where there is no cache; CacheVersionError; DamagedCacheError naming the file.
    """
    if read is None and not files.exists(MANIFEST_NAME):
        raise InputNotFoundError(
            f"no cache at {files.root}: it has no {MANIFEST_NAME}; make one with `emkd cache-teacher`"
        )
    read = read or (lambda name: files.read(name) or b"")
    manifest = Manifest.from_bytes(read(MANIFEST_NAME), files.where(MANIFEST_NAME))
    for number in range(1, count_extensions(files) + 1):
        where = files.where(plan_name(number))
        extension = _parse(where, read(plan_name(number)))
        if (extension.number, extension.parent_sha256) != (number, manifest.plan_sha256):
            raise DamagedCacheError(
                f"{where}: does not extend this cache: it is number {extension.number} of another one, or what it "
                f"extends was changed; {_RESTORE}"
            )
        manifest = manifest.model_copy(update={"extensions": (*manifest.extensions, extension)})
    return manifest


def extension_bytes(extension: Extension) -> bytes:
    """The content of plan.json."""
    value = extension.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _parse(where: str, data: bytes) -> Extension:
    try:
        return Extension.model_validate_json(data)
    except ValidationError as error:
        raise DamagedCacheError(f"{where}: not the plan of an extension: {error}; {_RESTORE}") from error
