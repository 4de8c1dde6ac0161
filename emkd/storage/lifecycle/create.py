"""Create a cache: write its basis, its manifest and its tokenizer.

The manifest is written only if absent: a folder with a manifest is a cache, and later runs must agree with it. The
basis of codes is written before, so that a manifest never names one that does not exist; a folder with nothing else is
not a cache yet. If a run is killed before the tokenizer is written, the next run writes it.
"""

from collections.abc import Sequence
from pathlib import Path

from emkd.errors import CacheConflictError, OutputExistsError
from emkd.storage.manifest.conflicts import ROWS, conflicts
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import basis_files, read_manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import MANIFEST_NAME, TOKENIZER_NAME, basis_name, is_basis
from emkd.storage.objects.open import open_files


def create_cache(uri: str | Path, manifest: Manifest, tokenizer_json: bytes, basis: bytes | None = None) -> Files:
    """Create a cache, or open an existing one that agrees with `manifest`; an existing one keeps its own basis.

    basis: the object that `manifest.basis` describes; None if the manifest has none, or if the cache exists

    Raises CacheConflictError, which names the settings that differ, OutputExistsError if the folder has files but is
    not a cache, CacheWriteError if it is not writable, and DamagedCacheError or CacheVersionError if the existing
    manifest cannot be read.
    """
    files = open_files(uri)
    check_folder(files)
    exists = files.exists(MANIFEST_NAME)
    if basis is not None and manifest.basis is not None and not exists:
        files.create(basis_name(manifest.basis.sha256), basis)
    if exists or not files.create(MANIFEST_NAME, manifest.to_bytes()):
        refuse(files, conflicts(read_manifest(files), manifest))
    if not files.create(TOKENIZER_NAME, tokenizer_json) and files.read(TOKENIZER_NAME) != tokenizer_json:
        refuse(files, [f"{TOKENIZER_NAME}: the cache has a different tokenizer from this run"])
    return files


def check_folder(files: Files) -> None:
    """Check that the folder has a cache, or is empty and writable. Cheap: a job calls it before it loads a model.

    Raises OutputExistsError if it has files but is not a cache, and CacheWriteError if it is not writable.
    """
    if files.exists(MANIFEST_NAME):
        return
    found = [name for name in files.names() if not is_basis(name)]  # one alone was left by a killed run
    if found and not files.exists(MANIFEST_NAME):  # again: another run may have created the cache meanwhile
        raise OutputExistsError(
            f"{files.root}: {len(found)} files that are not a cache ({found[0]}, ...); name an empty or a new folder"
        )
    files.check_writable()


def delete_unread_bases(files: Files) -> list[str]:
    """Delete bases of codes that the manifest does not name: jobs that were killed, or that lost a race, left them.

    Returns the names of what was deleted.
    """
    kept = basis_files(read_manifest(files, extensions=0))
    unread = [name for name in files.names() if is_basis(name) and name not in kept]
    for name in unread:
        files.delete(name)
    return unread


def refuse(files: Files, differences: Sequence[str]) -> None:
    """Raise CacheConflictError if the run differs from the cache in any setting. differences: from `conflicts`"""
    if differences:
        raise CacheConflictError(
            f"{files.root}: the folder has a cache with other settings:\n  "
            + "\n  ".join(differences)
            + "\nUse the settings of the cache, or name another folder"
            + (". Other rows can be added with --extend" if all(_about_rows(line) for line in differences) else "")
        )


def _about_rows(difference: str) -> bool:
    return difference.startswith(tuple(f"{field}." for field in ROWS))
