"""The rows of an index: one for each row of the plan, as an Arrow table and as a Parquet file.

The same columns make index/<n>.parquet (the rows of one shard) and index.parquet (all rows in plan order). In format
version 1 an image has no offset of its own, and indexes that were written before `text_sha256` was kept lack that
column: they stay as they are on disk, and get what is missing in memory (`with_all_columns`). A cache that rows with
texts are added to has indexes of both kinds.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.record import ImageSpan

TEXT_COLUMN = "text_sha256"

OK = "ok"
SKIPPED = "skipped"

_FIRST_IMAGE_TYPE = pa.struct(
    [
        ("text_position", pa.int32()),
        ("start", pa.int32()),
        ("count", pa.int32()),
        ("grids", pa.list_(pa.list_(pa.int32()))),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
# offset: where the image's vision tokens begin in the shard; several samples may have them in common
IMAGE_TYPE = pa.struct([*_FIRST_IMAGE_TYPE, ("offset", pa.int64())])

# Offsets and counts are in elements along the axis of the shard's arrays (see `layout`), 0 for skipped rows. A row's
# vision_offset is that of its first image; the images of a row need not follow each other.
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


_IMAGES = INDEX_SCHEMA.get_field_index("images")
# Of format version 1, with texts and without.
TEXT_SCHEMA = INDEX_SCHEMA.set(_IMAGES, pa.field("images", pa.list_(_FIRST_IMAGE_TYPE)))
FIRST_SCHEMA = TEXT_SCHEMA.remove(TEXT_SCHEMA.get_field_index(TEXT_COLUMN))
_SCHEMAS = (INDEX_SCHEMA, TEXT_SCHEMA, FIRST_SCHEMA)


def index_schema(format_version: int) -> pa.Schema:
    """Of the indexes that are written now, for caches of this version."""
    return TEXT_SCHEMA if format_version == 1 else INDEX_SCHEMA


def with_texts(table: pa.Table) -> pa.Table:
    """A table of an index with the column TEXT_COLUMN, null where it was written without."""
    if TEXT_COLUMN in table.column_names:
        return table
    missing = pa.nulls(len(table), pa.string())
    return table.append_column(TEXT_COLUMN, missing).select(INDEX_SCHEMA.names)


def with_all_columns(table: pa.Table) -> pa.Table:
    """A table of an index with INDEX_SCHEMA. Of format version 1, a row's images follow each other."""
    table = with_texts(table)
    if table.schema.field("images").type == INDEX_SCHEMA.field("images").type:
        return table
    placed = placed_images(table["images"], table["vision_offset"])
    return table.set_column(_IMAGES, INDEX_SCHEMA.field(_IMAGES), placed)


def placed_images(column: pa.ChunkedArray, vision_offset: pa.ChunkedArray) -> pa.ListArray:
    """The images of format version 1, which follow each other from a row's vision_offset on, with their own offsets."""
    images = column.combine_chunks()
    spans = images.flatten()
    bounds = images.offsets.to_numpy()
    rows = np.repeat(np.arange(len(images)), np.diff(bounds))
    offsets = pc.add(vision_offset.take(pa.array(rows)).combine_chunks(), spans.field("start"))
    fields = [spans.field(i) for i in range(spans.type.num_fields)]
    placed = pa.StructArray.from_arrays([*fields, offsets], fields=list(IMAGE_TYPE))
    return pa.ListArray.from_arrays(pa.array(bounds - bounds[0], pa.int32()), placed)


def n_stored_vision(table: pa.Table) -> int:
    """Vision tokens that the shard of an index has; those of images that rows share count once."""
    images = with_all_columns(table)["images"].combine_chunks().flatten()
    return pc.max(pc.add(images.field("offset"), images.field("count"))).as_py() or 0


def schema_of(found: pa.Schema) -> pa.Schema | None:
    """The one of the known schemas that this is, None for another one."""
    return next((known for known in _SCHEMAS if found.equals(known, check_metadata=False)), None)


def images_to_json(images: Sequence[ImageSpan], offsets: Sequence[int]) -> list[dict[str, Any]]:
    """Image spans as a value of IMAGE_TYPE (the older one ignores where they are in the shard)."""
    return [
        {
            "text_position": span.text_position,
            "start": span.start,
            "count": span.count,
            "grids": [list(grid) for grid in span.grids],
            "height": span.original_size[0],
            "width": span.original_size[1],
            "offset": offset,
        }
        for span, offset in zip(images, offsets, strict=True)
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
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DamagedCacheError(f"{where}: not the Parquet file that was written ({error}). {NEXT_STEP}") from error
    schema = schema_of(table.schema)
    if schema is None:
        raise DamagedCacheError(f"{where}: columns differ from those of an index. {NEXT_STEP}")
    # Parquet adds numbers to the fields on reading: without them the same rows make the same bytes again.
    return table.cast(schema.with_metadata(table.schema.metadata))
