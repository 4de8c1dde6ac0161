"""Paths of a call are looked at before anything that takes seconds to import, such as torch.

What is not there is said by the code that would have read it, so that it is said in the same words.
"""

import glob
from pathlib import Path

from emkd.errors import InputNotFoundError
from emkd.model_path import local_folder


def check_paths(
    *, model: str | None = None, data: tuple[str | None, ...] = (), cache: str | None = None, root: Path | None = None
) -> None:
    """Raise InputNotFoundError, or another UsageError, if a path that is read does not exist.

    model: a folder, or a name on the hub, which is not looked up;  data: datasets;  cache: one that has to exist
    root:  the folder of image paths
    """
    for name in filter(None, data):
        if not Path(name).exists() and not glob.glob(name):
            from emkd.samples.sources.find import find_files

            find_files(name)
    if root is not None and not root.is_dir():
        raise InputNotFoundError(f"--image-root {root} is not a folder")
    if model is not None:
        local_folder(model)
    if cache is not None and "://" not in cache and not (Path(cache) / "manifest.json").is_file():
        from emkd.storage.manifest.read import read_manifest
        from emkd.storage.objects.open import open_files

        read_manifest(open_files(cache))
