"""What an index takes in memory, from the headers of its Parquet pages, before Arrow decodes them.

A few bytes of Parquet may stand for any number of values (runs of equal ones, entries of a dictionary), so neither the
size of the file nor that of its decompressed pages bounds the memory. The header of each page says how many values it
has, and Arrow takes memory for no more. Headers are Thrift structs in its compact protocol:

    field    a byte: how much higher its number is than that of the field before (4 bits), its type (4 bits)
    integer  zigzag, 7 bits a byte, lowest first
    struct   fields, and a byte 0
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.storage.objects.sizes import check_explained

VALUE_BYTES = 16  # of any value that is no text, with its levels and validity
_DICTIONARY_PAGE = 2
_DICTIONARY_ENCODINGS = (2, 8)
# Fields of a page's header, and of the headers in it.
_TYPE, _PLAIN_SIZE, _SIZE, _DATA, _DICTIONARY, _DATA_2 = 1, 2, 3, 5, 7, 8
_N_VALUES, _ENCODING, _ENCODING_2 = 1, 2, 4
_DEEPEST = 8  # structs within structs


def check_parquet(where: str, data: bytes, file: pq.ParquetFile, columns: Container[str] | None = None) -> None:
    """Compare what some columns take in memory (None: all) with the bytes of the file.

    Raises DamagedCacheError if the bytes do not explain it, and ValueError if a header is not one.
    """
    found, n_bytes = file.metadata, len(data) + VALUE_BYTES * file.metadata.num_rows
    check_explained(where, n_bytes, len(data))
    for group in (found.row_group(i) for i in range(found.num_row_groups)):
        for column in (group.column(i) for i in range(group.num_columns)):
            if columns is None or column.path_in_schema.partition(".")[0] in columns:
                n_bytes += _column_bytes(where, data, column)
                check_explained(where, n_bytes, len(data))


def _column_bytes(where: str, data: bytes, column: Any) -> int:
    """Return the most bytes that the pages of a column in a row group take in memory."""
    starts = [column.dictionary_page_offset] if column.has_dictionary_page else []
    if column.num_values or column.data_page_offset:  # without rows there may be a dictionary alone, at offset 0
        starts.append(column.data_page_offset)
    if not starts:
        return 0
    at, end = min(starts), min(starts) + column.total_compressed_size
    if not 0 <= at <= end <= len(data):
        raise ValueError(f"pages from byte {at} to {end} of {len(data)}")
    total, longest = 0, 0
    while at < end:
        page = _PageHeader.read(data, at)
        at = page.end + page.n_bytes
        if at > end:
            raise ValueError(f"a page ends at byte {at}, its column at {end}")
        total += page.plain_bytes + VALUE_BYTES * page.n_values
        check_explained(where, total, len(data))
        if page.is_dictionary and column.physical_type == "BYTE_ARRAY":
            longest = max(longest, _longest(data[page.end : at], page, column.compression))
        elif page.uses_dictionary:
            total += longest * page.n_values
    return total


@dataclass(frozen=True, kw_only=True)
class _PageHeader:
    """end: of the header, where the page begins;  n_bytes, plain_bytes: of the page, compressed and not"""

    end: int
    n_bytes: int
    plain_bytes: int
    n_values: int
    is_dictionary: bool
    uses_dictionary: bool

    @classmethod
    def read(cls, data: bytes, at: int) -> "_PageHeader":
        try:
            end, fields = _struct(data, at, 0)
        except IndexError as error:
            raise ValueError(f"the header of a page at byte {at} is cut short") from error
        inner = next((fields[name] for name in (_DATA, _DATA_2, _DICTIONARY) if name in fields), None)
        inner = inner if isinstance(inner, dict) else {}
        sizes: list[Any] = [fields.get(_SIZE), fields.get(_PLAIN_SIZE), inner.get(_N_VALUES)]
        if any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError(f"the header of a page at byte {at} has the sizes {sizes}")
        is_dictionary = fields.get(_TYPE) == _DICTIONARY_PAGE
        encoding = inner.get(_ENCODING_2 if _DATA_2 in fields else _ENCODING)
        return cls(
            end=end,
            n_bytes=sizes[0],
            plain_bytes=sizes[1],
            n_values=sizes[2],
            is_dictionary=is_dictionary,
            uses_dictionary=not is_dictionary and encoding in _DICTIONARY_ENCODINGS,
        )


def _longest(body: bytes, page: _PageHeader, codec: str) -> int:
    """Return the bytes of the longest text in a dictionary page: each has 4 bytes with its length before it."""
    if codec == "UNCOMPRESSED":
        plain = body
    else:
        plain = pa.decompress(body, decompressed_size=page.plain_bytes, codec=codec.lower(), asbytes=True)
    at = longest = 0
    while at < len(plain):
        length = int.from_bytes(plain[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return longest


def _struct(data: bytes, at: int, depth: int) -> tuple[int, dict[int, Any]]:
    """Return (end, {number of a field: value}); values other than integers and structs are None."""
    if depth > _DEEPEST:
        raise ValueError("the header of a page has structs in structs")
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:
            number += step
        else:
            at, number = _integer(data, at)
        at, fields[number] = _value(data, at, kind, depth)
    return at + 1, fields


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[int, Any]:
    if kind in (1, 2):  # true, false: in the type
        return at, None
    if kind == 3:
        return at + 1, None
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return at + 8, None
    if kind == 8:  # a text: statistics
        at, length = _varint(data, at)
        return at + length, None
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError(f"the header of a page has a field of type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 128:
            return at, value
        if shift > 63:
            raise ValueError("the header of a page has a number of more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    at, value = _varint(data, at)
    return at, (value >> 1) ^ -(value & 1)
