"""Open the store at the URI that a user gives."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from emkd.errors import UsageError
from emkd.storage.objects.files import Files
from emkd.storage.objects.local import LocalFiles


def open_files(uri: str | Path) -> Files:
    """Return the store at a plain path or a file:// URI; creates nothing. Raises UsageError for any other scheme."""
    text = os.fspath(uri)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return LocalFiles(Path(text).expanduser())
    parts = urlsplit(text)
    if scheme.lower() != "file" or parts.netloc not in ("", "localhost"):
        raise UsageError(
            f"cannot open {text!r}: only local paths (a plain path or file:///...) are supported by this "
            "version; use a local folder and copy it afterwards"
        )
    return LocalFiles(Path(unquote(parts.path)))
