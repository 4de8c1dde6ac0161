import io

import numpy as np
import pytest
from PIL import Image

from emkd.errors import SampleError
from emkd.samples.images import decode_image
from tests import tiny


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pixels_come_back():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (np.asarray(decode_image(encoded(Image.fromarray(pixels)))) == pixels).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(Image.new(mode, (4, 3)), kind)).mode == "RGB"


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stands on its side
    image = decode_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif))
    assert image.size == (4, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image-broken"),
        (b"not an image", "image-broken"),
        (tiny.png(1)[:-40], "image-broken"),
        (encoded(Image.new("1", (20_000, 20_000))), "image-too-large"),
        (encoded(Image.new("L", (4, 4)), "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 9)]), "image-animated"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_says_why(data, reason):
    with pytest.raises(SampleError) as error:
        decode_image(data)
    assert error.value.reason == reason
