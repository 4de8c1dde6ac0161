"""An image entry of a row becomes encoded bytes.

    {bytes, path}, raw bytes, base64 text, a data: URI, or a path below --image-root --read_image_bytes--> bytes

For any entry the result is bytes or a SampleError that says why there are none. Errors that are not the row's fault (a
disk that fails) are raised unchanged: running again may help. `images.py` decodes the bytes.
"""

import base64
import binascii
import errno
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from emkd.errors import SampleError
from emkd.samples.known import AUDIO, VIDEO, text_kind

# No image within Pillow's limit of pixels needs a larger file, even uncompressed with 16 bits per channel.
MAX_FILE_BYTES = 1 << 30

# Errors of a path. Other errors (EIO, ESTALE, EMFILE) are the machine's, not the row's.
PATH_ERRORS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
}  # fmt: skip

FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# How base64 text of PNG, JPEG, GIF, WebP (RIFF), BMP and TIFF begins.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MAX_PATH = 4096


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Where image paths start from.

    path:         the folder that --image-root names; None if none is named
    follow_links: links inside the folder may lead out of it
    """

    path: Path | None = None
    follow_links: bool = False


def read_image_bytes(entry: object, folder: ImageFolder) -> bytes:
    """Read one image entry.

    Raises SampleError(image-missing | image-outside-root | image-too-large | image-broken | unread-image | video |
    audio), and OSError if the disk fails.
    """
    if isinstance(entry, Mapping):
        data, url = entry.get("bytes"), entry.get("url")
        entry = url if entry.get("path") is None and url is not None else entry.get("path")
        if isinstance(data, str) and (decoded := _from_base64(data)) is not None:
            return decoded
        if data is not None and not isinstance(data, bytes):
            raise SampleError("image-missing", f"the image entry has bytes of type {type(data).__name__}")
        if data is not None:
            return data
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str) or not entry:
        raise SampleError("image-missing", "the image entry has neither bytes nor a path")
    if entry[:5].lower() == "data:":
        return _from_data_uri(entry)
    decoded = _from_base64(entry)
    if decoded is not None:
        return decoded
    if len(entry) > _MAX_PATH:
        raise SampleError(
            "image-missing", f"a text of {len(entry)} characters is neither a path nor base64 of a known image format"
        )
    return _from_path(entry, folder)


def is_path(entry: object) -> bool:
    """Whether reading an entry needs an image root."""
    if isinstance(entry, Mapping):
        if entry.get("bytes") is not None:
            return False
        entry = entry.get("path") or entry.get("url")
    if not isinstance(entry, str) or not entry or entry[:5].lower() == "data:":
        return False
    return _from_base64(entry) is None and (_URL.match(entry) is None or entry.startswith("file://"))


def _from_base64(text: str) -> bytes | None:
    """The bytes of base64 text, None if it is not base64 of an image: a path may have the same characters."""
    if len(text) < 64 or not text.lstrip().startswith(_BASE64_STARTS) or not _BASE64.fullmatch(text):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        return None


def _from_data_uri(uri: str) -> bytes:
    head, comma, data = uri[5:].partition(",")
    if not comma:
        raise SampleError("image-broken", f"a data: URI without a comma: {uri:.60}")
    kind = text_kind(f"data:{head}")
    if kind in (VIDEO, AUDIO):
        raise SampleError(kind, f"a data: URI of type {head:.60}")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode("".join(unquote(data).split()), validate=True)
    except ValueError as error:
        raise SampleError("image-broken", f"a data: URI whose base64 is damaged: {error}") from error


def _from_path(entry: str, folder: ImageFolder) -> bytes:
    if entry.startswith("file://"):
        entry = unquote(entry.removeprefix("file://"))
    kind = text_kind(entry)
    if kind in (VIDEO, AUDIO):
        raise SampleError(kind, f"the image entry is {kind}: {entry!r:.200}")
    if _URL.match(entry):
        raise SampleError(
            "image-missing",
            f"{entry!r:.200} is a URL, and nothing is downloaded: download the images and name their folder with "
            "--image-root",
        )
    if folder.path is None:
        raise SampleError(
            "image-missing", f"{entry!r:.200} is a path: name the folder that it starts from with --image-root"
        )
    try:
        path = _resolved(entry, folder.path.resolve(), folder.follow_links)
        _check_file(entry, path.stat())
        return path.read_bytes()
    except FileNotFoundError:
        raise SampleError("image-missing", f"no file {entry!r:.200} below the image root") from None
    except OSError as error:
        if error.errno not in PATH_ERRORS:
            raise
        raise SampleError("image-missing", f"cannot read {entry!r:.200}: {error.strerror}") from error


def _resolved(name: str, root: Path, follow_links: bool) -> Path:
    """The file that a path below the root means. Raises SampleError if it leads outside."""
    try:
        path = (root / name).resolve()  # follows links in all its parts
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a link that points to itself
        raise SampleError("image-missing", f"{name!r:.200} is not a path: {type(error).__name__}") from error
    if path.is_relative_to(root):
        return path
    plain = Path(os.path.normpath(root / name))  # by its text alone
    if not plain.is_relative_to(root):
        raise SampleError("image-outside-root", f"{name!r:.200} is outside the image root")
    if follow_links:
        return plain
    link = _first_link(plain, root)
    raise SampleError(
        "image-outside-root",
        f"{name!r:.200} is reached through the link {link!r:.200}, which leads outside the image root; --follow-links "
        "follows links that lie inside the root",
    )


def _first_link(path: Path, root: Path) -> str:
    """The first part of a path below the root that is a link out of it, by its path below the root."""
    parts = path.relative_to(root).parts
    found = (root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1))
    outside = (link for link in found if link.is_symlink() and not link.resolve().is_relative_to(root))
    return str(next(outside, path).relative_to(root))


def _check_file(name: str, status: os.stat_result) -> None:
    """Check a file before it is opened: reading a pipe, a device or a sparse file might never end."""
    if not stat.S_ISREG(status.st_mode):
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise SampleError("image-missing", f"{name!r:.200} is {kind}, not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise SampleError("image-too-large", f"{name!r:.200} has {status.st_size} bytes, the limit is {MAX_FILE_BYTES}")
