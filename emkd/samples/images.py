"""Encoded image bytes: where they come from and how they become pixels."""

import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from emkd.errors import SampleError


def read_image_bytes(entry: object, image_root: Path | None) -> bytes:
    """Bytes of one image entry: {bytes, path}, raw bytes, or a path below `image_root`.

    Raises SampleError(image-missing | image-outside-root).
    """
    if isinstance(entry, dict):
        data, entry = entry.get("bytes"), entry.get("path")
        if data is not None and not isinstance(data, bytes):
            raise SampleError("image-missing", f"the image entry has bytes of type {type(data).__name__}")
        if data is not None:
            return data
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str) or not entry:
        raise SampleError("image-missing", "the image entry has neither bytes nor a path")
    if image_root is None:
        raise SampleError("image-missing", f"{entry!r} is a path: say where it lies with --image-root")
    return _read_below(entry, image_root.resolve())


def _read_below(name: str, root: Path) -> bytes:
    try:
        path = (root / name).resolve()  # follows links: a link out of the root is outside, too
    except (OSError, ValueError) as error:
        raise SampleError("image-missing", f"{name!r} is no path: {error}") from error
    if not path.is_relative_to(root):
        raise SampleError("image-outside-root", f"{name!r} leads outside of the image root")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SampleError("image-missing", f"no file {name!r} below the image root") from None
    except (OSError, ValueError) as error:
        raise SampleError("image-missing", f"cannot read {name!r}: {error}") from error


def decode_image(data: bytes) -> Image.Image:
    """An upright RGB image; EXIF rotation is applied, so that pixels stand as a person sees them.

    Raises SampleError(image-broken | image-too-large | image-animated).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            n_frames = getattr(image, "n_frames", 1)
            if n_frames > 1 and image.format != "MPO":  # a photo with a preview or a second lens behind it
                raise SampleError("image-animated", f"{n_frames} frames; store the one frame that is meant")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SampleError("image-too-large", str(error)) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("image-broken", f"{len(data)} bytes that do not decode: {error}") from error
