"""Images of every mode, depth and rotation against naive references, and a skip reason for damage of every kind."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from emkd.errors import SampleError, UsageError
from emkd.samples.images import decode_image
from tests import tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = np.array([[0, 128, 129, 257], [385, 386, 30_000, 65_535]], dtype=np.uint16)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(data: bytes) -> SampleError:
    with pytest.raises(SampleError) as error:
        decode_image(data)
    return error.value


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """Written by hand, since Pillow writes only what it reads."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int, data: bytes, photometric: int = 1, sample_format: int = 1) -> bytes:
    tags = [
        (256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
        (279, len(data)), (339, sample_format),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_pixels_come_back():
    assert (decoded(encoded(Image.fromarray(PIXELS))) == PIXELS).all()


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    return image


def flat(mode: str, *colour: int) -> Image.Image:
    return Image.new(mode, (2, 1), colour[0] if len(colour) == 1 else colour)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(flat("L", 7)), [7, 7, 7]),
        (encoded(flat("1", 1)), [255, 255, 255]),
        (encoded(flat("1", 1), "TIFF"), [255, 255, 255]),
        (encoded(flat("RGBA", 100, 50, 25, 0)), [100, 50, 25]),
        (encoded(flat("LA", 100, 0)), [100, 100, 100]),
        (encoded(flat("L", 7), transparency=7), [7, 7, 7]),
        (encoded(flat("RGB", 9, 8, 7), transparency=(9, 8, 7)), [9, 8, 7]),
        (encoded(palette(), transparency=b"\x00\x80"), [255, 0, 0]),
        (encoded(palette(), transparency=0), [255, 0, 0]),
        (encoded(palette(), "GIF", transparency=0), [255, 0, 0]),
        (encoded(palette().convert("PA"), "TIFF"), [255, 0, 0]),
        (encoded(flat("CMYK", 0, 255, 255, 0), "JPEG"), [255, 0, 0]),
        (encoded(flat("CMYK", 0, 255, 255, 0), "TIFF"), [255, 0, 0]),
        (encoded(flat("YCbCr", 76, 85, 255), "JPEG"), [255, 0, 0]),
        (encoded(flat("YCbCr", 76, 85, 255), "TIFF"), [255, 0, 0]),
        (encoded(flat("LAB", 136, 208, 195), "TIFF"), [255, 0, 0]),
    ],
)
def test_other_modes_become_rgb_and_transparency_is_dropped(data, expected):
    """Warnings are errors in the tests, so Pillow's about palettes with transparency would show."""
    assert np.abs(decoded(data)[0, 0].astype(int) - expected).max() <= 12


# ---- more than 8 bits


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("I;16", encoded(Image.fromarray(DEEP))),
        ("I;16", encoded(Image.fromarray(DEEP), "TIFF")),
        ("I;16B", encoded(Image.frombytes("I;16B", (4, 2), DEEP.astype(">u2").tobytes()), "TIFF")),
        ("I", b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes()),
        ("I;16", encoded(Image.fromarray(DEEP), "JPEG2000")),
    ],
)
def test_sixteen_bits_of_grey_are_scaled_and_rounded(mode, data):
    assert Image.open(io.BytesIO(data)).mode == mode
    expected = np.round(DEEP / 257).astype(np.uint8)
    assert (decoded(data) == expected[..., None]).all()


def test_sixteen_bits_of_colour():
    deep = np.array([[[0, 300, 65_535], [128 * 257, 129, 40_000]]], dtype=np.uint16)
    found = decoded(png(2, 1, 16, 2, b"\0" + deep.astype(">u2").tobytes()))
    assert np.abs(found - deep / 257).max() < 1


def test_tiffs_of_12_bits_and_of_white_at_zero():
    twelve = decoded(tiff(2, 1, 12, bytes([0xFF, 0xF8, 0x00])))
    assert twelve[0, :, 0].tolist() == [255, 128]
    inverted = decoded(tiff(4, 2, 16, DEEP.astype("<u2").tobytes(), photometric=0))
    assert (inverted[..., 0] == np.round((65_535 - DEEP.astype(float)) / 257)).all()


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "I"),
        (encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), "F"),
        (tiff(2, 1, 16, bytes(4), sample_format=2), "I"),
        (b"Pf\n1 1\n-1.0\n" + bytes(4), "F"),
    ],
)
def test_depths_without_a_white_point_are_refused(data, mode):
    error = refusal(data)
    assert error.reason == "image-depth"
    assert f"of mode {mode}, which does not define what value is white; store 8 or 16 bits" in error.detail


# ---- rotation


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_exif_rotation_is_applied(orientation, kind, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), kind, exif=exif, **options)
    assert (decoded(data) == UPRIGHT[orientation](PIXELS)).all()


def test_a_deep_image_is_turned_as_well():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (decoded(encoded(Image.fromarray(DEEP), exif=exif))[..., 0] == np.rot90(np.round(DEEP / 257), -1)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",  # more tags than there are bytes
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\0\0\x01\0\x06\0\0",  # a count beyond the end
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",  # an orientation that is a text
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # an orientation of 99
    ],
)
def test_damaged_exif_costs_no_picture(kind, exif):
    """The image is decoded as stored, and Pillow's warnings (errors in the tests) are suppressed."""
    found = decoded(encoded(Image.new("RGB", (8, 4), (9, 9, 9)), kind, exif=exif))
    assert found.shape == (4, 8, 3)
    assert np.abs(found.astype(int) - 9).max() <= 2


# ---- what cannot be used


def no_width(data: bytes, place: int, n_bytes: int) -> bytes:
    return data[:place] + bytes(n_bytes) + data[place + n_bytes :]


FRAMES = [Image.new("RGB", (4, 4), (50 * n, 0, 0)) for n in range(3)]
BMP = encoded(FRAMES[0], "BMP")
GIF = encoded(Image.new("P", (4, 4)), "GIF")


def animated(kind: str) -> bytes:
    return encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (70 << 20), zip=True)
    return encoded(Image.new("L", (4, 4)), pnginfo=info)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image-broken"),
        (b"not an image", "image-broken"),
        (tiny.png(1)[:-40], "image-broken"),
        (encoded(FRAMES[0], "JPEG")[:-40], "image-broken"),
        (png(0, 4, 8, 0, bytes(4)), "image-broken"),
        (b"P6 0 4 255\n", "image-broken"),
        (b"P6 4 0 255\n", "image-broken"),
        (no_width(BMP, 18, 4), "image-broken"),
        (no_width(BMP, 22, 4), "image-broken"),
        (no_width(GIF, GIF.index(b",") + 5, 2), "image-broken"),
        (no_width(no_width(GIF, 6, 2), GIF.index(b",") + 5, 2), "image-broken"),
        (text_bomb(), "image-broken"),
        (encoded(Image.new("1", (20_000, 20_000))), "image-too-large"),
        (encoded(Image.new("1", (10_000, 10_000))), "image-too-large"),
        (animated("GIF"), "image-animated"),
        (animated("PNG"), "image-animated"),
        (animated("WEBP"), "image-animated"),
        (animated("TIFF"), "image-animated"),
    ],
)
def test_what_cannot_be_used_says_why(data, reason):
    error = refusal(data)
    assert error.reason == reason
    assert " at 0x" not in error.detail, "an address in memory would make two runs' indexes differ"


def test_postscript_is_not_run():
    """If Ghostscript is installed, Pillow would run the row's program with it."""
    assert refusal(encoded(FRAMES[0], "EPS")).detail.startswith("PostScript is a program")


def test_one_frame_is_no_animation_and_a_photo_with_a_preview_is_a_photo():
    assert decode_image(encoded(FRAMES[1], save_all=True)).size == (4, 4)
    assert np.abs(decoded(animated("MPO"))[0, 0].astype(int)).max() <= 2


def second_page_without_a_size() -> bytes:
    """A TIFF whose next page is said to be where its pixels are: zeros, a page of no tags."""
    return tiff(4, 2, 8, bytes(8))[:-4] + struct.pack("<I", 8)


def dds(flags: int) -> bytes:
    data = bytearray(encoded(FRAMES[0], "DDS"))
    struct.pack_into("<I", data, 80, flags)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "raised"), [(second_page_without_a_size(), TypeError), (dds(0x91), NotImplementedError)]
)
def test_decoders_raise_what_they_like(data, raised):
    with pytest.raises(raised):
        _ = Image.open(io.BytesIO(data)).n_frames  # DDS fails on opening, TIFF on counting
    assert refusal(data).detail.startswith(f"{len(data)} bytes that do not decode: {raised.__name__}")


def test_a_machine_without_memory_is_not_the_rows_fault(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode_image(tiny.png(1))


def whole_files() -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 17, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    return [
        encoded(image, exif=exif),
        encoded(image.quantize(8), transparency=b"\0\1\2"),
        encoded(Image.fromarray(DEEP)),
        encoded(image, "JPEG", exif=exif),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "GIF"),
        encoded(image, "WEBP", exif=exif),
        encoded(image, "TIFF", exif=exif),
        encoded(Image.fromarray(DEEP), "TIFF"),
        animated("MPO"),
    ]


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5)


@settings(max_examples=400, deadline=None)
@given(data=st.sampled_from(whole_files()), end=st.floats(0, 1), flips=FLIPS)
def test_damage_of_any_kind_is_a_picture_or_a_reason(data, end, flips):
    damaged = bytearray(data[: round(end * len(data))] if end < 0.9 else data)
    for place, value in flips:
        if damaged:
            damaged[int(place * len(damaged))] = value
    try:
        found = decode_image(bytes(damaged)).mode
    except SampleError as error:
        found = error.reason
    assert found in {"RGB", "image-broken", "image-too-large", "image-animated", "image-depth"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True, "truncated images would be learnt with a grey rest"),
        ("PIL.Image.MAX_IMAGE_PIXELS", None, "other rows would be skipped as too large"),
        ("PIL.Image.MAX_IMAGE_PIXELS", 100, "set it to that before emkd reads images"),
    ],
)
def test_what_the_rest_of_the_program_asks_of_pillow_changes_no_row(monkeypatch, name, value, said):
    """Other packages set these for the whole process: the same row would then be another picture."""
    cut = tiny.png(1)[:-40]
    with pytest.raises(SampleError, match="image-broken"):
        decode_image(cut)
    monkeypatch.setattr(name, value)
    with pytest.raises(UsageError, match=f"{name} is .* in this program.*{said}"):
        decode_image(cut)
