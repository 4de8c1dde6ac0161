"""Encoded image bytes become pixels.

    entry of a row --image_entry.py--> encoded bytes --decode_image--> upright RGB image, 8 bits a channel

For any bytes, the result is an image or a SampleError that says why there is none. A machine without memory is not the
row's fault: that error is raised unchanged.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from emkd.errors import SampleError, UsageError

# Pillow's own limit. Programs set another one, or none, for the whole process.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3

DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}  # grey of more than 8 bits, as Pillow names it
# Formats whose deep grey Pillow returns in, or scales to, 16 bits: 65535 is white. TIFF states its bits, others do not.
SIXTEEN_BIT_FORMATS = {"PNG", "PPM", "JPEG2000"}

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """Decode an upright RGB image: EXIF rotation is applied, so that the model sees what a person sees.

    Transparency is dropped, as the models' own preprocessing does; 16 bits of grey are scaled to 8.

    Raises SampleError(image-broken | image-too-large | image-animated | image-depth), and UsageError if the program has
    changed how Pillow decodes.
    """
    _check_pillow()
    with warnings.catch_warnings():
        # Pillow warns of damage that it ignores (EXIF, odd TIFF tags, palettes with transparency). The image decodes or
        # it does not, a user cannot act on such a line, and a dataset of phone photos would print thousands.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _decode(data)
        except (
            SampleError,
            MemoryError,
        ):  # an image below the limit of pixels needs little memory: the machine has none left
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise SampleError("image-too-large", str(error)) from error
        except UnidentifiedImageError as error:  # its text has an address in memory, which differs between runs
            raise SampleError("image-broken", f"{len(data)} bytes of an unknown image format") from error
        # On damage, decoders raise many errors (struct.error, EOFError, IndexError, TypeError, zlib.error,
        # NotImplementedError, RuntimeError, ...). These bytes are their only input, so it is always the row's fault.
        except Exception as error:
            detail = f"{len(data)} bytes that do not decode: {type(error).__name__}: {error!s:.500}"
            raise SampleError("image-broken", detail) from error


def _check_pillow() -> None:
    """Raise UsageError if another part of the program has changed which images Pillow decodes, for all of it.

    The same row would be skipped in one program, and be an image whose lower half is grey in another.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this program, so that truncated images would be learnt with "
            "a grey rest instead of being skipped; set it to False before emkd reads images"
        )
    if Image.MAX_IMAGE_PIXELS != MAX_PIXELS:
        raise UsageError(
            f"PIL.Image.MAX_IMAGE_PIXELS is {Image.MAX_IMAGE_PIXELS} in this program, so that other rows would be "
            f"skipped as too large than with Pillow's own {MAX_PIXELS}; set it to that before emkd reads images"
        )


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":  # Pillow would let Ghostscript, if installed, run the program in the file
        raise SampleError("image-broken", "PostScript is a program, not an image; store PNG or JPEG")
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1 and image.format != "MPO":  # MPO: a photo with a preview, or of a second lens
        raise SampleError("image-animated", f"{n_frames} frames; store the one frame that the row is about")
    image.load()
    method = _turn(image)
    rgb = (_eight_bit_grey(image) if image.mode in DEEP_MODES else image).convert("RGB")
    return rgb if method is None else rgb.transpose(method)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The turn that makes the image upright, by EXIF or XMP; None if it is upright or these are damaged.

    ImageOps.exif_transpose does the same, but raises if EXIF is damaged: a good image would be lost for that.
    """
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - a foreign parser, as in decode_image; all viewers ignore such damage
        return None


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Scale grey of up to 16 bits to 8 bits and round. Pillow's `convert` cuts at 255: most pixels would be white."""
    white = _white_point(image)
    if white is None:
        raise SampleError(
            "image-depth",
            f"a {image.format} image of mode {image.mode}, which does not define what value is white; "
            "store 8 or 16 bits per channel",
        )
    values = np.minimum(np.asarray(image).astype(np.uint32), white)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # WhiteIsZero
        values = white - values
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def _white_point(image: Image.Image) -> int | None:
    """The value that is white, or None if the format does not define it (32 bits, floats, scientific formats)."""
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        return int((1 << image.tag_v2[BITSPERSAMPLE][0]) - 1)  # 12 bits have this mode, too
    return 65535 if image.format in SIXTEEN_BIT_FORMATS and image.mode != "F" else None
