"""The names that objects of a cache have on disk, and what a name says. Nothing here reads a file's content.

manifest.json  tokenizer.json  index.parquet  seal.json
shards/<shard>-<attempt>/...   index/<shard>.parquet
extensions/<extension>/plan.json, index.parquet, seal.json
"""

import re

from emkd.storage.objects.files import Files

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"

_INDEX = re.compile(r"index/(\d{6,})\.parquet")
_SHARD = re.compile(r"shards/(\d{6,})-[^/]+(?:/.+)?")
_ATTEMPT = re.compile(r"[A-Za-z0-9_.-]+")
_EXTENSION = re.compile(r"extensions/(\d{6})/(?:plan\.json|index\.parquet|seal\.json)")  # nothing that strayed there


def shard_prefix(shard: int, attempt: str) -> str:
    """The folder of one attempt at a shard. ValueError for an attempt that cannot be part of a name."""
    if not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"attempt {attempt!r}; expected letters, digits, '_', '.' and '-' only")
    return f"shards/{shard:06d}-{attempt}"


def index_name(shard: int) -> str:
    """The index of a shard, whose appearance commits it."""
    return f"index/{shard:06d}.parquet"


def plan_name(extension: int) -> str:
    """The plan of an extension, 1 or more."""
    return f"extensions/{extension:06d}/plan.json"


def seal_name(extension: int) -> str:
    """The seal of a cache with so many extensions."""
    return f"extensions/{extension:06d}/seal.json" if extension else "seal.json"


def table_name(extension: int) -> str:
    """The consolidated index of a cache with so many extensions."""
    return f"extensions/{extension:06d}/index.parquet" if extension else "index.parquet"


def indexed_shard(name: str) -> int | None:
    """The shard whose index has this name; None for another object."""
    return _number(_INDEX, name)


def shard_of_folder(name: str) -> int | None:
    """The shard that a folder of `shards/`, or an object in it, is an attempt at; None for another name."""
    return _number(_SHARD, name)


def shard_of_object(name: str) -> int | None:
    """The shard that an object belongs to, as its index or in the folder of an attempt; None for another object."""
    shard = shard_of_folder(name)
    return indexed_shard(name) if shard is None else shard


def extension_of(name: str) -> int | None:
    """The extension that an object belongs to; None for another object."""
    return _number(_EXTENSION, name)


def committed_shards(files: Files) -> list[int]:
    """Numbers of the shards that have an index, ascending. Lists names; reads no file."""
    return sorted(shard for shard in map(indexed_shard, files.names("index")) if shard is not None)


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.fullmatch(name)
    return int(match[1]) if match else None
