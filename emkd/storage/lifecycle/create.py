"""The beginning of a cache: its manifest and its tokenizer.

The manifest comes first, and only if absent: a folder with a manifest is a cache, and whoever comes later
must agree with it. A run that was killed between the two files is completed by the next one.
"""

from collections.abc import Sequence
from pathlib import Path

from emkd.errors import CacheConflictError, OutputExistsError
from emkd.storage.manifest.conflicts import ROWS, conflicts
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import MANIFEST_NAME, TOKENIZER_NAME
from emkd.storage.objects.open import open_files


def create_cache(uri: str | Path, manifest: Manifest, tokenizer_json: bytes) -> Files:
    """Begin a cache, or come back to one that agrees with `manifest`.

    CacheConflictError names the settings that differ; OutputExistsError where the folder has other things
    in it; DamagedCacheError and CacheVersionError for a manifest that cannot be read.
    """
    files = open_files(uri)
    check_place(files)
    if not files.create(MANIFEST_NAME, manifest.to_bytes()):
        refuse(files, conflicts(read_manifest(files), manifest))
    if not files.create(TOKENIZER_NAME, tokenizer_json) and files.read(TOKENIZER_NAME) != tokenizer_json:
        refuse(files, [f"{TOKENIZER_NAME}: the cache has another tokenizer than this run"])
    return files


def check_place(files: Files) -> None:
    """OutputExistsError where other things than a cache are in the folder; CacheWriteError where it may not be
    written. Cheap: a job looks before it loads a model."""
    if files.exists(MANIFEST_NAME):
        return
    found = files.names()
    if found and not files.exists(MANIFEST_NAME):  # another run may just have begun
        raise OutputExistsError(
            f"{files.root}: {len(found)} files that are not a cache ({found[0]}, ...); name an empty or a new folder"
        )
    files.check_writable()


def refuse(files: Files, differences: Sequence[str]) -> None:
    if differences:
        raise CacheConflictError(
            f"{files.root}: a cache made with other settings is there:\n  "
            + "\n  ".join(differences)
            + "\nUse the settings of the cache, or name another folder"
            + (". Other rows can be added with --extend" if all(_about_rows(line) for line in differences) else "")
        )


def _about_rows(difference: str) -> bool:
    return difference.startswith(tuple(f"{field}." for field in ROWS))
