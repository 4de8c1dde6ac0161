"""Codes of the tokens of one image, or of one sample's text or answers, as bytes: a frame.

    forms     1 byte for each group of columns: how many bits a number of the group takes
    payload   one zstd frame of all numbers, packed, in the order of the columns; each column has all its tokens

Columns of similar spread make a group. Zstd gets a block of its own for each group, so that numbers of one distribution
share one Huffman table; any zstd decoder reads it. Neighbouring groups of one form are packed together:

    0    all numbers are 0; nothing is stored
    2, 4 four or two numbers in a byte, each plus 2 or 8: those that lie a quarter or half of the numbers apart, so that
         unpacking writes contiguous parts. It saves the Huffman code's rounding to whole bits for numbers of little
         entropy, and time
    8    one byte, two's complement
    16   the lower bytes of all numbers, then the upper ones: q = 256 upper + lower, both signed, so that the upper
         ones are mostly 0

Shape legend: n tokens, r columns (codes of a token), N numbers that are packed together
"""

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby, pairwise

import numpy as np
import zstandard
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.sizes import unpack_zstd

# Repeats that zstd finds in codes are chance: naming them takes more bytes than it saves. So the search is as weak as
# zstd allows: the smallest table, the longest shortest match.
_SEARCH = {"hash_log": zstandard.HASHLOG_MIN, "min_match": zstandard.MINMATCH_MAX}
_LEVEL = 1
# The largest number that fits into so many bits; the most negative one is one further from 0.
_MOST = {0: 0, 2: 1, 4: 7, 8: 127, 16: 32767}
# A block of fewer bytes is not worth a Huffman table.
_LEAST_BLOCK = 2048
_of_thread = threading.local()


def encode_frame(codes: NDArray[np.signedinteger], groups: Sequence[int]) -> bytes:
    """Return the frame of codes [n, r], int16 or int8. groups: columns of each group, r together

    Raises ValueError if the groups do not have r columns.
    """
    if sum(groups) != codes.shape[1]:
        raise ValueError(f"groups of {sum(groups)} columns, codes have {codes.shape[1]}")
    by_column = np.ascontiguousarray(codes.T)
    bounds = np.cumsum([0, *groups]).tolist()
    highest, lowest = by_column.max(axis=1, initial=0), by_column.min(axis=1, initial=0)
    largest = np.maximum(highest, ~lowest)  # ~-8 is 7: both fit into 4 bits
    used = (highest > 0) | (lowest < 0)
    forms = [
        _form(int(largest[first:last].max(initial=0)), bool(used[first:last].any())) for first, last in pairwise(bounds)
    ]
    parts = [part for segment in _segments(forms, groups) for part in _packed(by_column, *segment)]
    return bytes(forms) + _compressed(parts)


def _form(largest: int, used: bool) -> int:
    return next(bits for bits, most in _MOST.items() if bits >= 2 * used and largest <= most)


def _segments(forms: Sequence[int], groups: Sequence[int]) -> Iterator[tuple[int, slice, int]]:
    """Yield (form, columns, number of groups) of each run of groups of one form."""
    first = 0
    for form, run in groupby(zip(forms, groups, strict=True), key=lambda pair: pair[0]):
        sizes = [size for _, size in run]
        yield form, slice(first, first + sum(sizes)), len(sizes)
        first += sum(sizes)


def _packed(
    by_column: NDArray[np.signedinteger], form: int, columns: slice, n_groups: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a segment, in as many parts as may become blocks."""
    numbers = by_column[columns].reshape(-1)
    if form == 0:
        return
    lower = numbers.astype(np.int8)
    if form == 16:
        yield lower.view(np.uint8)
        packed = ((numbers - lower) >> 8).astype(np.int8).view(np.uint8)
    else:
        packed = _several_in_a_byte(lower.view(np.uint8), form)
    yield from np.array_split(packed, n_groups)


def _several_in_a_byte(small: NDArray[np.uint8], form: int) -> NDArray[np.uint8]:
    if form == 8:
        return small
    size = -(-len(small) * form // 8)
    packed = np.zeros(size, np.uint8)
    for part in range(8 // form):
        some = small[part * size : (part + 1) * size] + np.uint8(1 << (form - 1))
        packed[: len(some)] |= some << (form * part)
    return packed


def _compressed(parts: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return one zstd frame of all parts, with a block for each; small ones share a block."""
    total = sum(map(len, parts))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=total, write_content_size=True, **_SEARCH
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=total)
    found, since = [], 0
    for part in parts:
        found.append(compressor.compress(part.data))
        since += len(part)
        if since >= _LEAST_BLOCK:
            found.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
            since = 0
    return b"".join([*found, compressor.flush()])


def fits_int8(data: bytes | memoryview, groups: Sequence[int]) -> bool:
    """Return whether all codes of a frame do, by the forms of its groups."""
    return 16 not in bytes(data[: len(groups)])


def decode_frame(where: str, data: bytes | memoryview, groups: Sequence[int], out: NDArray[np.signedinteger]) -> None:
    """Decode a frame into `out`, [r, n]: the transpose of what was encoded.

    where: of the data, for messages;  out: int16, or int8 if the frame `fits_int8`

    Raises DamagedCacheError if the bytes are not the frame of r columns in these groups and n tokens.
    """
    n_tokens = out.shape[1]
    try:
        segments = _stored_segments(bytes(data[: len(groups)]), tuple(groups))
        sizes = [-(-n_columns * n_tokens * form // 8) for form, _, n_columns in segments]
        payload = np.frombuffer(_decompressed(data[len(groups) :], sum(sizes)) if any(sizes) else b"", np.uint8)
    except ValueError as error:
        raise DamagedCacheError(f"{where}: not the codes of {n_tokens} tokens ({error}). {NEXT_STEP}") from error
    first = 0
    for (form, columns, _), size in zip(segments, sizes, strict=True):
        _unpack(payload[first : first + size], form, out[columns])
        first += size


def _decompressed(data: bytes | memoryview, n_bytes: int) -> bytes:
    """Return the content of a zstd frame. Raises ValueError, before memory is taken, if it does not say n_bytes."""
    if not hasattr(_of_thread, "decompressor"):  # making one takes a tenth of the time of a frame
        _of_thread.decompressor = zstandard.ZstdDecompressor()
    return unpack_zstd(data, n_bytes, _of_thread.decompressor)


@lru_cache(maxsize=1024)
def _stored_segments(forms: bytes, groups: tuple[int, ...]) -> tuple[tuple[int, slice, int], ...]:
    """Return (form, columns, number of columns) of each segment. Raises ValueError for a form that does not exist.

    Most frames of a cache have one of few combinations of forms, and small frames are read often.
    """
    wrong = set(forms) - _MOST.keys()
    if wrong or len(forms) != len(groups):
        raise ValueError(f"forms {sorted(wrong)} of {len(forms)} groups")
    return tuple((form, columns, columns.stop - columns.start) for form, columns, _ in _segments(list(forms), groups))


def _unpack(packed: NDArray[np.uint8], form: int, out: NDArray[np.signedinteger]) -> None:
    """Unpack the numbers of a segment into `out`, some of the rows of [r, n]."""
    if form == 0:
        out[...] = 0
    elif form == 8:
        out[...] = packed.view(np.int8).reshape(out.shape)
    elif form == 16:
        lower, upper = packed.view(np.int8).reshape(2, *out.shape)
        out[...] = upper
        out *= 256
        out += lower
    else:
        numbers = np.empty(len(packed) * 8 // form, np.uint8)
        *lower, uppermost = numbers.reshape(8 // form, -1)
        for part, some in enumerate(lower):
            np.bitwise_and(packed >> (form * part) if part else packed, (1 << form) - 1, out=some)
        np.right_shift(packed, 8 - form, out=uppermost)
        np.subtract(numbers[: out.size].view(np.int8).reshape(out.shape), np.int8(1 << (form - 1)), out=out)
