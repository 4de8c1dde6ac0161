"""Which files --data names: a file, a folder, a glob, or the name of a data set in the hub's local cache.

Files whose names begin with a dot, and files that describe a data set, are no data. Where several splits are found
below a folder, none is chosen: training on a test split would go unnoticed.
"""

import glob
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from emkd.errors import DataFormatError, InputNotFoundError, UsageError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
FORMATS = {"parquet": (".parquet",), "tar": (".tar",), "arrow": (".arrow",)} | {
    "json": (*JSON_SUFFIXES, *(f"{suffix}.gz" for suffix in JSON_SUFFIXES))
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# Files beside data that describe them.
_DESCRIPTIONS = re.compile(r"(dataset_infos?|dataset_dict|state|sizes|.*_stats)\.json")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"(?P<split>.*?)[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?")

_CONVERT = (
    "write one row for each sample as .jsonl or .parquet, with messages and images; the documentation's page on data "
    "has snippets"
)
_WAYS = {
    (".csv", ".tsv", ".txt", ".xlsx"): f"a table of texts has no conversations: {_CONVERT}",
    (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"): "unpack it to a .tar, which is read without unpacking it",
    (".zip", ".rar", ".7z"): "unpack it, and name the data file in it",
    (".parquet.gz", ".parquet.zst"): "unpack it: Parquet compresses its columns itself",
    (".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".json.zst"): "unpack it, or compress it with gzip (.jsonl.gz)",
    (".mds", ".lance", ".tfrecord", ".beton", ".h5", ".hdf5", ".pkl", ".pt", ".npz"): _CONVERT,
}


def find_files(data: str) -> list[Path]:
    """The files, sorted by name. Raises InputNotFoundError, DataFormatError, UsageError if several splits are found."""
    if re.match(r"[a-z][a-z0-9+.-]*://", data, re.IGNORECASE):
        raise UsageError(
            f"{data}: nothing is downloaded; download the files first (of the hub: hf download --repo-type dataset "
            "NAME) and name their folder"
        )
    path = Path(data)
    if path.is_dir():
        paths = _in_folder(path)
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(p) for p in sorted(glob.glob(data))] or _cached(data)
    if not paths:
        raise InputNotFoundError(
            f"no data at {data}: expected a {', '.join(SUFFIXES)} file, a folder of them, a glob, or the name of a "
            "data set of the hub that is on this machine (hf download --repo-type dataset NAME)"
        )
    for found in paths:
        if format_of(found) is None:
            raise DataFormatError(f"{found}: unknown format; expected one of {', '.join(SUFFIXES)}{_way(found)}")
    return paths


def absolute_data(data: str) -> str:
    """The same data, by an absolute path. Names in the hub's cache and URIs stay as they are."""
    if "://" in data or (_NAME.fullmatch(data) and not Path(data).exists() and _cached(data)):
        return data
    return str(Path(data).expanduser().absolute())


def format_of(path: Path) -> str | None:
    """A key of FORMATS, by the end of a file's name in upper or lower case; None for an unknown one."""
    name = path.name.lower()
    return next((kind for kind, suffixes in FORMATS.items() if name.endswith(suffixes)), None)


def _way(path: Path) -> str:
    name = path.name.lower()
    way = next((way for suffixes, way in _WAYS.items() if name.endswith(suffixes)), None)
    return "" if way is None else f". For this one: {way}"


def _in_folder(folder: Path) -> list[Path]:
    """The data files of a folder: those in it, or, if it has none, those of the only split below it."""
    if (folder / "state.json").is_file():
        return _saved_to_disk(folder)
    direct = [path for path in sorted(folder.iterdir()) if _is_data(path)]
    if direct:
        return _one_format(folder, direct)
    below = (path for path in sorted(folder.rglob("*")) if _is_data(path))
    hidden = (path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return _only_split(folder, hidden)


def _is_data(path: Path) -> bool:
    name = path.name
    if name.startswith((".", "cache-")) or _DESCRIPTIONS.fullmatch(name):
        return False
    return format_of(path) is not None and path.is_file()


def _one_format(folder: Path, paths: list[Path]) -> list[Path]:
    """Parquet files alone if there are some: JSON beside them describes them. Raises UsageError for other mixtures."""
    formats = {format_of(path) for path in paths}
    if "parquet" in formats:
        return [path for path in paths if format_of(path) == "parquet"]
    if len(formats) > 1:
        names = ", ".join(path.name for path in paths)
        raise UsageError(
            f"{folder} has files of several formats ({names:.300}); name those that are the data by a glob"
        )
    return paths


def _only_split(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """The files of the only split. Raises UsageError with a glob of each split if there are several."""
    splits: dict[Path, list[Path]] = {}
    for path in paths:
        stem = path.name[: -len(next(s for s in SUFFIXES[::-1] if path.name.lower().endswith(s)))]
        found = _SPLIT.fullmatch(stem)
        start = stem if found is None else found["split"]
        splits.setdefault(path.parent / f"{start}*{path.name[len(stem) :]}", []).append(path)
    if len(splits) > 1:
        globs = ", ".join(f"'{pattern}'" for pattern in list(splits)[:8])
        raise UsageError(f"{folder} has {len(splits)} splits; name one of them: --data {globs}")
    return [path for found in splits.values() for path in found]


def _saved_to_disk(folder: Path) -> list[Path]:
    """The files of one `Dataset.save_to_disk`, in the order that it names."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
    except (ValueError, TypeError, KeyError) as error:
        raise DataFormatError(f"{folder}/state.json is not that of `save_to_disk`: {error!r:.200}") from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataFormatError(f"{folder} was saved with an index of rows: save it again after `flatten_indices()`")
    return [folder / name for name in names]


def _cached(name: str) -> list[Path]:
    """The files of a data set of the hub, from this machine's caches; none without one. Nothing is downloaded."""
    if not _NAME.fullmatch(name):
        return []
    for folder in (_hub_snapshot(name), _datasets_cache() / name.replace("/", "___")):
        if folder is not None and folder.is_dir():
            found = _in_folder(folder)
            if found:
                return found
    return []


def _hub_snapshot(name: str) -> Path | None:
    """The folder of the data set's files in the hub's cache (huggingface_hub), None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _datasets_cache() -> Path:
    """Where `datasets` keeps what it has prepared."""
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets").expanduser()
