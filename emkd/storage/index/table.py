"""The rows of an index: one for each row of the plan, as an Arrow table and as a Parquet file.

index/<n>.parquet (the rows of one shard) and index.parquet (all rows in plan order) have the same columns. In format
version 1, images have no `offset`; indexes written before `text_sha256` existed lack that column. These files stay as
they are on disk, and `with_all_columns` adds the missing columns in memory. A cache may hold indexes with and without
`text_sha256` if it was extended.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emkd.errors import DamagedCacheError
from emkd.storage.arrays.layout import IndexedAxis
from emkd.storage.index.parquet_sizes import check_parquet
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.record import ImageSpan

TEXT_COLUMN = "text_sha256"
MAY_BE_NULL = (TEXT_COLUMN, "retained_mass")

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
# offset: position in the shard of the image's first vision token; several samples may share these tokens
IMAGE_TYPE = pa.struct([*_FIRST_IMAGE_TYPE, ("offset", pa.int64())])

# Offsets and counts are in elements along the axis of the shard's arrays (see `layout`), 0 for skipped rows. A row's
# vision_offset is that of its first image; the images of a row need not be adjacent in the shard.
INDEX_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("key", pa.string()),
        (TEXT_COLUMN, pa.string()),  # "" if the row has no conversation, null if the hash is not known
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
# The schemas of format version 1, with text_sha256 and without.
TEXT_SCHEMA = INDEX_SCHEMA.set(_IMAGES, pa.field("images", pa.list_(_FIRST_IMAGE_TYPE)))
FIRST_SCHEMA = TEXT_SCHEMA.remove(TEXT_SCHEMA.get_field_index(TEXT_COLUMN))
_SCHEMAS = (INDEX_SCHEMA, TEXT_SCHEMA, FIRST_SCHEMA)


def offset_column(axis: IndexedAxis) -> str:
    """Return the column with the position of a row's first element along `axis` in the shard's arrays."""
    return f"{axis}_offset"


def count_column(axis: IndexedAxis) -> str:
    """Return the column with the number of a row's elements along `axis`."""
    return f"{axis}_count"


def index_schema(format_version: int) -> pa.Schema:
    """Return the schema of the indexes that this emkd writes for caches of `format_version`."""
    return TEXT_SCHEMA if format_version == 1 else INDEX_SCHEMA


def with_texts(table: pa.Table) -> pa.Table:
    """Return the table of an index with the column TEXT_COLUMN, null if it was written without."""
    if TEXT_COLUMN in table.column_names:
        return table
    missing = pa.nulls(len(table), pa.string())
    return table.append_column(TEXT_COLUMN, missing).select(INDEX_SCHEMA.names)


def with_all_columns(table: pa.Table) -> pa.Table:
    """Return the table of an index with INDEX_SCHEMA: TEXT_COLUMN and the offsets of images are added if missing."""
    table = with_texts(table)
    if table.schema.field("images").type == INDEX_SCHEMA.field("images").type:
        return table
    images = images_with_offsets(table["images"], table[offset_column("vision")])
    return table.set_column(_IMAGES, INDEX_SCHEMA.field(_IMAGES), images)


def images_with_offsets(column: pa.ChunkedArray, vision_offset: pa.ChunkedArray) -> pa.ListArray:
    """Return the images of format version 1 with offsets: a row's images are adjacent, starting at `vision_offset`."""
    images = column.combine_chunks()
    spans = images.flatten()
    bounds = images.offsets.to_numpy()
    rows = np.repeat(np.arange(len(images)), np.diff(bounds))
    offsets = pc.add(vision_offset.take(pa.array(rows)).combine_chunks(), spans.field("start"))
    fields = [spans.field(i) for i in range(spans.type.num_fields)]
    with_offsets = pa.StructArray.from_arrays([*fields, offsets], fields=list(IMAGE_TYPE))
    return pa.ListArray.from_arrays(pa.array(bounds - bounds[0], pa.int32()), with_offsets)


def n_stored_vision(table: pa.Table) -> int:
    """Return the number of vision tokens that an index's shard stores; tokens of images that rows share count once."""
    images = with_all_columns(table)["images"].combine_chunks().flatten()
    return pc.max(pc.add(images.field("offset"), images.field("count"))).as_py() or 0


def schema_of(found: pa.Schema) -> pa.Schema | None:
    """Return the schema of an index, of any version, that equals `found`; None if there is none."""
    return next((known for known in _SCHEMAS if found.equals(known, check_metadata=False)), None)


def images_to_json(images: Sequence[ImageSpan], offsets: Sequence[int]) -> list[dict[str, Any]]:
    """Return image spans as a value of the column `images`. The type of format version 1 ignores the offsets."""
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
    """Invert images_to_json; the offsets are dropped."""
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
    """Return the bytes of a Parquet file with the table of an index, a pure function of the arguments."""
    buffer = BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata).combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(where: str, data: bytes) -> pa.Table:
    """Read the table of an index, with the columns that it was written with, from the bytes of a Parquet file.

    Raises DamagedCacheError if they are not a Parquet file or its columns are not those of an index.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        check_parquet(where, data, file)
        table = file.read(use_threads=False)
        table.validate(full=True)
    except DamagedCacheError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise DamagedCacheError(f"{where}: not a readable Parquet file ({error}). {NEXT_STEP}") from error
    schema = schema_of(table.schema)
    if schema is None:
        raise DamagedCacheError(f"{where}: its columns are not the columns of an index. {NEXT_STEP}")
    # Reading Parquet adds field ids to the schema. Without them, the same rows give the same bytes when written again.
    try:
        return table.cast(schema.with_metadata(table.schema.metadata))
    except (pa.ArrowException, ValueError) as error:
        raise DamagedCacheError(f"{where}: not a readable Parquet file ({error}). {NEXT_STEP}") from error
