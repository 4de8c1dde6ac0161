"""The rows of an index: one for each row of the plan, as an Arrow table and as a Parquet file.

The same columns make index/<n>.parquet (the rows of one shard) and index.parquet (all rows in plan order). Indexes
that were written before `text_sha256` was kept lack that column: they stay as they are on disk, and in memory it is
null (`with_all_columns`). A cache that such rows are added to has indexes of both kinds.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.errors import DamagedCacheError
from emkd.storage.digest import NEXT_STEP
from emkd.storage.record import ImageSpan

TEXT_COLUMN = "text_sha256"

OK = "ok"
SKIPPED = "skipped"

IMAGE_TYPE = pa.struct(
    [
        ("text_position", pa.int32()),
        ("start", pa.int32()),
        ("count", pa.int32()),
        ("grids", pa.list_(pa.list_(pa.int32()))),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)

# Offsets and counts are in elements along the axis of the shard's arrays (see `layout`), 0 for skipped rows.
INDEX_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("key", pa.string()),
        (TEXT_COLUMN, pa.string()),  # "" where the row has no conversation, null where it is not known
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("shard", pa.int32()),
        ("text_offset", pa.int64()),
        ("text_count", pa.int64()),
        ("vision_offset", pa.int64()),
        ("vision_count", pa.int64()),
        ("affinity_offset", pa.int64()),
        ("affinity_count", pa.int64()),
        ("answer_offset", pa.int64()),
        ("answer_count", pa.int64()),
        ("images", pa.list_(IMAGE_TYPE)),
        ("retained_mass", pa.float64()),  # null without vision tokens
    ]
)


FIRST_SCHEMA = INDEX_SCHEMA.remove(INDEX_SCHEMA.get_field_index(TEXT_COLUMN))


def with_all_columns(table: pa.Table) -> pa.Table:
    """A table of an index with the columns of INDEX_SCHEMA, null where it was written without them."""
    if TEXT_COLUMN in table.column_names:
        return table
    missing = pa.nulls(len(table), pa.string())
    return table.append_column(TEXT_COLUMN, missing).select(INDEX_SCHEMA.names)


def images_to_json(images: Sequence[ImageSpan]) -> list[dict[str, Any]]:
    """Image spans as a value of IMAGE_TYPE."""
    return [
        {
            "text_position": span.text_position,
            "start": span.start,
            "count": span.count,
            "grids": [list(grid) for grid in span.grids],
            "height": span.original_size[0],
            "width": span.original_size[1],
        }
        for span in images
    ]


def images_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[ImageSpan, ...]:
    """The inverse of images_to_json."""
    return tuple(
        ImageSpan(
            text_position=value["text_position"],
            start=value["start"],
            count=value["count"],
            grids=tuple((rows, columns) for rows, columns in value["grids"]),
            original_size=(value["height"], value["width"]),
        )
        for value in values
    )


def write_parquet(table: pa.Table, metadata: dict[bytes, bytes] | None = None) -> bytes:
    """The table of an index as the bytes of a Parquet file: the same ones each time."""
    buffer = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata).combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(where: str, data: bytes) -> pa.Table:
    """The table in the bytes of a Parquet file, with the columns that it was written with; DamagedCacheError where
    they are not those of an index."""
    try:
        table = pq.ParquetFile(BytesIO(data)).read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DamagedCacheError(f"{where}: not the Parquet file that was written ({error}). {NEXT_STEP}") from error
    schema = INDEX_SCHEMA if TEXT_COLUMN in table.column_names else FIRST_SCHEMA
    if not table.schema.equals(schema, check_metadata=False):
        raise DamagedCacheError(f"{where}: columns differ from those of an index. {NEXT_STEP}")
    # Parquet adds numbers to the fields on reading: without them the same rows make the same bytes again.
    return table.cast(schema.with_metadata(table.schema.metadata))
