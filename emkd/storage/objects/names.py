"""The names of a cache's objects on disk, and what each name says. Nothing here reads the content of a file.

manifest.json  tokenizer.json  index.parquet  seal.json  basis-<beginning of its hash>.safetensors
shards/<shard>-<attempt>/...   index/<shard>.parquet
extensions/<extension>/plan.json, index.parquet, seal.json
"""

import re

from emkd.storage.objects.files import Files

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"

_BASIS = re.compile(r"basis-[0-9a-f]{16}\.safetensors")
_INDEX = re.compile(r"index/(\d{6,})\.parquet")
_SHARD = re.compile(r"shards/(\d{6,})-[^/]+(?:/.+)?")
_ATTEMPT = re.compile(r"[A-Za-z0-9_.-]+")
_EXTENSION = re.compile(r"extensions/(\d{6})/(?:plan\.json|index\.parquet|seal\.json)")  # ignores stray files


_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def is_plain(name: object) -> bool:
    """Return whether this can be the name of an object of a cache: relative, inside of its folder, and plain ASCII.

    Names are read from files, which may be forged.
    """
    return isinstance(name, str) and _KEY.fullmatch(name) is not None and ".." not in name


def basis_name(sha256: str) -> str:
    """Return the name of the basis with this hash. It is written before the manifest that names it, so that jobs which
    start at the same time cannot replace each other's."""
    return f"basis-{sha256[:16]}.safetensors"


def is_basis(name: str) -> bool:
    """Return whether this is the name of a basis, of any cache."""
    return _BASIS.fullmatch(name) is not None


def shard_prefix(shard: int, attempt: str) -> str:
    """Return the folder of one attempt at a shard. Raises ValueError if the attempt cannot be part of a name."""
    if not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"attempt {attempt!r}; expected letters, digits, '_', '.' and '-' only")
    return f"shards/{shard:06d}-{attempt}"


def index_name(shard: int) -> str:
    """Return the name of a shard's index, whose appearance commits the shard."""
    return f"index/{shard:06d}.parquet"


def plan_name(extension: int) -> str:
    """Return the name of an extension's plan; extensions are numbered from 1."""
    return f"extensions/{extension:06d}/plan.json"


def seal_name(extension: int) -> str:
    """Return the name of the seal of extension `extension`, 0 for the cache before any extension."""
    return f"extensions/{extension:06d}/seal.json" if extension else "seal.json"


def table_name(extension: int) -> str:
    """Return the name of the consolidated index of extension `extension`, 0 for the cache before any extension."""
    return f"extensions/{extension:06d}/index.parquet" if extension else "index.parquet"


def indexed_shard(name: str) -> int | None:
    """Return the shard whose index has this name, None if it is not the name of an index."""
    return _number(_INDEX, name)


def shard_of_folder(name: str) -> int | None:
    """Return the shard of an attempt's folder in `shards/`, or of an object in it; None for any other name."""
    return _number(_SHARD, name)


def shard_of_object(name: str) -> int | None:
    """Return the shard that an object belongs to, as its index or in an attempt's folder; None for other objects."""
    shard = shard_of_folder(name)
    return indexed_shard(name) if shard is None else shard


def extension_of(name: str) -> int | None:
    """Return the extension that an object belongs to, None for other objects."""
    return _number(_EXTENSION, name)


def committed_shards(files: Files) -> list[int]:
    """Return the shards that have an index, ascending. Lists names; reads no file."""
    return sorted(shard for shard in map(indexed_shard, files.names("index")) if shard is not None)


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.fullmatch(name)
    return int(match[1]) if match else None
