"""A model's name: a folder that is there, or a name on the hub. Imports nothing slow, for checks of a call."""

from pathlib import Path

from emkd.errors import InputNotFoundError


def local_folder(name: str) -> Path | None:
    """Return the folder of a saved model, or None for a name that the hub may have.

    Raises InputNotFoundError for a folder without a model, and for a path that does not exist.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputNotFoundError(f"{name} is a folder without config.json: not a saved model")
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputNotFoundError(f"no model {name!r}: there is no such folder, and it is not a name on the hub")
    return None
