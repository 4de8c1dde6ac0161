"""Arrow tables as rows: what Parquet files and `save_to_disk` folders have in common."""

from collections.abc import Sequence

import pyarrow as pa

from emkd.errors import DataFormatError, SampleError
from emkd.samples.known import (
    CONTENT_KEYS,
    CONVERSATION_COLUMNS,
    IMAGE_COLUMNS,
    PART,
    ROW,
    TURN,
    Level,
    is_media_name,
    is_unread,
)
from emkd.samples.sources.source import SEE, RawRow


def text_columns(where: str, schema: pa.Schema) -> list[str]:
    """The columns of the conversation. Raises DataFormatError if there is none."""
    found = [name for name in CONVERSATION_COLUMNS if name in schema.names]
    if not found:
        raise DataFormatError(
            f"{where} has no column {' or '.join(map(repr, CONVERSATION_COLUMNS))}; it has {schema.names!r:.500}. {SEE}"
        )
    return found


def row_columns(schema: pa.Schema) -> list[str]:
    """The columns of a row that are read: known ones, and those that may be a reason to skip the row. Numbers,
    and lists and objects of numbers, are not, unless their names have a word for media."""
    first = [name for name in ("id", *IMAGE_COLUMNS, *CONVERSATION_COLUMNS) if name in schema.names]
    return first + [field.name for field in schema if field.name not in first and _may_matter(field)]


def _may_matter(field: pa.Field) -> bool:
    if field.name in ROW.refused or is_media_name(field.name):
        return True
    return _has_texts(field.type)


def _has_texts(kind: pa.DataType) -> bool:
    """Whether values of a type may hold text or bytes, at any depth."""
    if pa.types.is_dictionary(kind):
        return _has_texts(kind.value_type)
    if pa.types.is_nested(kind):
        return any(_has_texts(kind.field(n).type) for n in range(kind.num_fields))
    tests = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary),
    )
    return any(test(kind) for test in tests)


def unread_names(schema: pa.Schema) -> set[str]:
    """Names of columns, and of keys of turns and parts, that are listed once (see known.py)."""
    found = {name for name in schema.names if is_unread(ROW, name)}
    for column in CONVERSATION_COLUMNS:
        if column in schema.names:
            found |= _keys(schema.field(column).type, f"{column}[]", (TURN, PART))
    return found


def _keys(kind: pa.DataType, where: str, levels: Sequence[Level]) -> set[str]:
    """Names in the objects of a list, and in those of the lists that stand in it as contents."""
    item = kind.value_type if _is_list(kind) else None
    if item is None or not pa.types.is_struct(item) or not levels:
        return set()
    fields = [item.field(n) for n in range(item.num_fields)]
    found = {f"{where}.{field.name}" for field in fields if is_unread(levels[0], field.name)}
    for field in fields:
        if field.name in CONTENT_KEYS:
            found |= _keys(field.type, f"{where}.{field.name}[]", levels[1:])
    return found


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def rows_of(table: pa.Table) -> list[RawRow | SampleError]:
    """The rows as Python objects. Arrow does not check that text is UTF-8: such a row affects no other row."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        return [row_of(table.slice(index, 1)) for index in range(table.num_rows)]


def row_of(table: pa.Table) -> RawRow | SampleError:
    """The only row of a table."""
    try:
        return dict(table.to_pylist()[0])
    except UnicodeDecodeError as error:
        return SampleError("bad-content", f"the row has a text that is not valid UTF-8: {error.reason}")
