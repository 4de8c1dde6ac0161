"""Codes of the tokens of one image, or of one sample's text or answers, as bytes: a frame.

Columns of similar spread make a group, which is compressed by itself: numbers of one distribution share one Huffman
table of zstd. Within a group the columns follow each other, each with all its tokens. A frame is, for each group,

    form      1 byte: 0 all numbers are 0;  2, 4, 8 or 16 bits a number, two's complement
    size      4 bytes, little endian: of each part of the payload that follows (one part; two for 16 bits)
    payload   zstd of the numbers, packed into bytes

2 bits put four numbers into a byte and 4 bits two, a quarter or half of the group apart, so that unpacking writes
contiguous parts. That saves the Huffman code's rounding to whole bits for numbers of little entropy, and time. 16 bits
are stored as the lower bytes, then the upper ones: q = 256 upper + lower, both signed, so that the upper ones are
mostly 0.

Shape legend: n tokens, r columns (codes of a token), g columns of a group
"""

from collections.abc import Iterator, Sequence

import numcodecs.zstd
import numpy as np
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP

_LEVEL = 1
# The largest absolute value, except for the most negative one, that fits into so many bits.
_FORMS = {0: 0, 2: 1, 4: 7, 8: 127, 16: 32767}


def encode_frame(codes: NDArray[np.int16], groups: Sequence[int]) -> bytes:
    """Return the frame of codes [n, r]. groups: columns of each group, r together

    Raises ValueError if the groups do not have r columns.
    """
    if sum(groups) != codes.shape[1]:
        raise ValueError(f"groups of {sum(groups)} columns, codes have {codes.shape[1]}")
    by_column = np.ascontiguousarray(codes.T)
    parts = []
    first = 0
    for size in groups:
        parts += _encode_group(by_column[first : first + size].reshape(-1))
        first += size
    return b"".join(parts)


def _encode_group(numbers: NDArray[np.int16]) -> list[bytes]:
    """Return the parts of the frame that hold a group's numbers, [g * n]."""
    largest = int(np.maximum(numbers.max(initial=0), ~numbers.min(initial=0)))  # ~-8 is 7: both fit into 4 bits
    form = next(bits for bits, most in _FORMS.items() if largest <= most and (bits or not numbers.any()))
    if form == 0:
        return [b"\0"]
    packed = [numcodecs.zstd.compress(part, _LEVEL) for part in _pack(numbers, form)]
    return [bytes([form]), *(len(part).to_bytes(4, "little") for part in packed), *packed]


def _pack(numbers: NDArray[np.int16], form: int) -> list[NDArray[np.uint8]]:
    if form == 16:
        lower = numbers.astype(np.int8)
        return [lower.view(np.uint8), ((numbers - lower) >> 8).astype(np.int8).view(np.uint8)]
    small = numbers.astype(np.int8).view(np.uint8)
    if form == 8:
        return [small]
    each = 8 // form
    size = -(-len(small) // each)
    packed = np.zeros(size, np.uint8)
    for part in range(each):
        some = small[part * size : (part + 1) * size] & ((1 << form) - 1)
        packed[: len(some)] |= some << (form * part)
    return [packed]


def decode_frame(where: str, data: bytes, groups: Sequence[int], out: NDArray[np.int16]) -> None:
    """Decode a frame into `out`, [r, n]: the transpose of what was encoded.

    where: of the data, for messages

    Raises DamagedCacheError if the bytes are not the frame of r groups' columns and n tokens.
    """
    view, at = memoryview(data), 0
    first = 0
    try:
        for size in groups:
            numbers = out[first : first + size].reshape(-1)
            at = _decode_group(view, at, numbers)
            first += size
    except (ValueError, RuntimeError, IndexError) as error:
        raise DamagedCacheError(f"{where}: not the codes of {out.shape[1]} tokens ({error}). {NEXT_STEP}") from error
    if at != len(data):
        raise DamagedCacheError(f"{where}: {len(data) - at} bytes after the codes. {NEXT_STEP}")


def _decode_group(view: memoryview, at: int, numbers: NDArray[np.int16]) -> int:
    """Fill a group's numbers from the bytes at `at`, and return where the next group is."""
    form = view[at]
    if form not in _FORMS:
        raise ValueError(f"form {form}")
    at += 1
    if form == 0:
        numbers[...] = 0
        return at
    n_parts = 2 if form == 16 else 1
    ends = [int.from_bytes(view[at + 4 * i : at + 4 * i + 4], "little") for i in range(n_parts)]
    at += 4 * n_parts
    n_bytes = len(numbers) if form >= 8 else -(-len(numbers) * form // 8)
    parts = []
    for size in ends:
        part = np.frombuffer(numcodecs.zstd.decompress(bytes(view[at : at + size])), np.uint8)
        if len(part) != n_bytes:
            raise ValueError(f"{len(part)} bytes, expected {n_bytes}")
        parts.append(part)
        at += size
    _unpack(parts, form, numbers)
    return at


def _unpack(parts: Sequence[NDArray[np.uint8]], form: int, numbers: NDArray[np.int16]) -> None:
    if form == 16:
        np.left_shift(parts[1].view(np.int8), 8, out=numbers, dtype=np.int16)
        numbers += parts[0].view(np.int8)
        return
    if form == 8:
        numbers[...] = parts[0].view(np.int8)
        return
    for part, some in enumerate(_split(numbers, len(parts[0]))):
        # Up to the top of the byte, and down again with the sign.
        shifted = np.left_shift(parts[0][: len(some)], 8 - form * (part + 1)).view(np.int8)
        some[...] = np.right_shift(shifted, 8 - form, out=shifted)


def _split(numbers: NDArray[np.int16], size: int) -> Iterator[NDArray[np.int16]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
