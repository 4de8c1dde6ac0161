"""The rows of an index: one for each row of the plan, as an Arrow table and as a Parquet file.

The same columns make index/<n>.parquet (the rows of one shard) and index.parquet (all rows in plan order).
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.errors import DamagedCacheError
from emkd.storage.digest import NEXT_STEP
from emkd.storage.record import ImageSpan

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
    """A table of INDEX_SCHEMA as the bytes of a Parquet file: the same ones each time."""
    buffer = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata).combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(where: str, data: bytes) -> pa.Table:
    """The table in the bytes of a Parquet file; DamagedCacheError where it is not one of INDEX_SCHEMA."""
    try:
        table = pq.ParquetFile(BytesIO(data)).read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DamagedCacheError(f"{where}: not the Parquet file that was written ({error}). {NEXT_STEP}") from error
    if not table.schema.equals(INDEX_SCHEMA, check_metadata=False):
        raise DamagedCacheError(f"{where}: columns differ from those of an index. {NEXT_STEP}")
    # Parquet adds numbers to the fields on reading: without them the same rows make the same bytes again.
    return table.cast(INDEX_SCHEMA.with_metadata(table.schema.metadata))
