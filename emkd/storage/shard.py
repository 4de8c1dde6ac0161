"""Writing: the rows of one shard become one Zarr group, whole, and its index.

A shard is encoded in memory and then written object by object, so that the hashes in its index are of what
was meant, not of what a disk gave back. The folder belongs to this attempt alone and means nothing until
`index.commit_shard`. The same rows and manifest give the same objects, bit for bit.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from emkd.errors import OutputExistsError
from emkd.storage.check import check_rows
from emkd.storage.described import described_names
from emkd.storage.digest import ObjectDigest
from emkd.storage.files import LocalFiles, writing
from emkd.storage.index import ShardIndex, index_name, shard_prefix
from emkd.storage.layout import AXES, ArrayLayout, Axis, array_layouts, group_attributes
from emkd.storage.manifest import Manifest
from emkd.storage.precision import (
    LogitsPrecision,
    decode_logits,
    encode_affinity,
    encode_logits,
)
from emkd.storage.record import CapturedRow, Record
from emkd.storage.table import INDEX_SCHEMA, OK, SKIPPED, TEXT_COLUMN, images_to_json


def write_shard(
    files: LocalFiles, number: int, attempt: str, rows: Sequence[CapturedRow], manifest: Manifest
) -> ShardIndex:
    """Write one attempt at a shard, durably, and return its index for `commit_shard`.

    `rows` are the plan's rows of the shard, all of them and in order, skipped ones included. ValueError where
    they are not, or where a record has other shapes, ids or values than `record` documents (a mistake of the
    caller); OutputExistsError where the attempt has been written before; CacheWriteError where the disk is full or
    may not be written, with nothing left behind. Logits whose order ties after
    rounding are put in the order that a record promises: equal ones by ascending id.
    """
    prefix = shard_prefix(number, attempt)
    if files.names(prefix):
        raise OutputExistsError(
            f"{files.where(prefix)}: this attempt has been written already; give each attempt its own name"
        )
    check_rows(rows, number, manifest)
    objects = _encode_group(rows, number, manifest)
    with writing(files, f"shard {number}", sum(map(len, objects.values()))):
        try:
            for name, data in objects.items():
                files.write(f"{prefix}/{name}", data)
            files.sync_tree(prefix)
            files.sync_names(described_names(manifest))
        except OSError as error:
            # --clean took what had lost already: a folder is gone, or was between being found and being looked at.
            if isinstance(error, FileNotFoundError | FileExistsError) and files.exists(index_name(number)):
                return _shard_index(rows, number, attempt, objects, manifest)
            # A full disk: what is of no use must not fill it. Should that fail as well, it is the first error that
            # says what to do, and nobody reads the folder.
            with contextlib.suppress(OSError):
                files.delete_tree(prefix)
            raise
    return _shard_index(rows, number, attempt, objects, manifest)


def _shard_index(
    rows: Sequence[CapturedRow], number: int, attempt: str, objects: Mapping[str, bytes], manifest: Manifest
) -> ShardIndex:
    return ShardIndex(
        shard=number,
        attempt=attempt,
        settings_sha256=manifest.shard_sha256(number),
        objects={name: ObjectDigest.of(data) for name, data in objects.items()},
        table=_index_table(rows, number),
        halvings={row.hint.row: row.halvings for row in rows if row.halvings},
    )


def retained_mass(record: Record) -> float | None:
    """Mean over the vision tokens of the softmax mass of the stored ids; None without vision tokens."""
    if not len(record.vision_logits):
        return None
    logits = record.vision_logits.astype(np.float64)
    peak = logits.max(axis=1)
    stored = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    whole = np.logaddexp(stored, record.vision_tail_logsumexp.astype(np.float64))
    return float(np.exp(stored - whole).mean())


def _encode_group(rows: Sequence[CapturedRow], number: int, manifest: Manifest) -> dict[str, bytes]:
    """Name -> bytes of every object of the shard's Zarr group, sorted by name."""
    records = [_encode_record(row.record, manifest) for row in rows if row.record is not None]
    stored: dict[str, Buffer] = {}
    store: Store = MemoryStore(stored)
    group = zarr.create_group(store=store, zarr_format=3, attributes=group_attributes(manifest, number))
    for layout in array_layouts(manifest):
        empty = np.empty(layout.shape(0), layout.dtype)
        _write_array(group, layout, np.concatenate([empty, *(record[layout.name] for record in records)]))
    return {name: stored[name].to_bytes() for name in sorted(stored)}


def _write_array(group: zarr.Group, layout: ArrayLayout, values: NDArray[Any]) -> None:
    """One array, all its chunks at once. A chunk of zeros is written too: a missing one reads as zeros."""
    array = group.create_array(
        layout.name,
        shape=values.shape,
        dtype=layout.dtype,
        chunks=layout.chunks(len(values)),
        compressors=[layout.codec],
        filters=None,
        fill_value=0,
        attributes=layout.attributes,
        dimension_names=layout.dimension_names,
        config={"write_empty_chunks": True},
    )
    if values.size:
        array[...] = values


def _encode_record(record: Record, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """What is stored of a record, by array name. ValueError for values that do not fit the precision."""
    precision = manifest.logits_precision
    vision_ids, vision_logits = _ranked(record.vision_ids, record.vision_logits, precision)
    answer_ids, answer_logits = _ranked(record.answer_ids, record.answer_logits, precision)
    return {
        "text_ids": record.text_ids,
        "vision_ids": vision_ids,
        "vision_logits": vision_logits,
        "vision_tail_logsumexp": record.vision_tail_logsumexp,
        "vision_tail_mean": record.vision_tail_mean,
        "affinity": encode_affinity(record.affinity, manifest.affinity_precision).reshape(-1),
        "answer_positions": record.answer_positions,
        "answer_ids": answer_ids,
        "answer_logits": answer_logits,
        "answer_tail_logsumexp": record.answer_tail_logsumexp,
    }


def _ranked(
    ids: NDArray[np.int32], logits: NDArray[np.float32], precision: LogitsPrecision
) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """ids and encoded logits [n, k]; rows in which rounding made ties are ordered again by id."""
    stored = encode_logits(logits, precision)
    rounded = decode_logits(stored, precision)
    tied = (rounded[:, :-1] == rounded[:, 1:]) & (ids[:, :-1] > ids[:, 1:])
    rows = np.flatnonzero(tied.any(axis=1))
    if not len(rows):
        return ids, stored
    order = np.lexsort((ids[rows], -rounded[rows]), axis=1)
    ids, stored = ids.copy(), stored.copy()
    ids[rows] = np.take_along_axis(ids[rows], order, axis=1)
    stored[rows] = np.take_along_axis(stored[rows], order, axis=1)
    return ids, stored


def _index_table(rows: Sequence[CapturedRow], number: int) -> pa.Table:
    """One row of INDEX_SCHEMA for each row of the plan."""
    offsets: dict[Axis, int] = dict.fromkeys(AXES, 0)
    entries = []
    for row in rows:
        counts = _counts(row.record)
        entry: dict[str, Any] = {
            "row": row.hint.row,
            "id": row.hint.id,
            "key": row.key,
            TEXT_COLUMN: row.text_sha256,
            "status": SKIPPED if row.record is None else OK,
            "reason": row.reason,
            "detail": row.detail,
            "shard": number,
            "images": [] if row.record is None else images_to_json(row.record.images),
            "retained_mass": None if row.record is None else retained_mass(row.record),
        }
        for axis in AXES:
            entry[f"{axis}_offset"] = 0 if row.record is None else offsets[axis]
            entry[f"{axis}_count"] = counts[axis]
            offsets[axis] += counts[axis]
        entries.append(entry)
    return pa.Table.from_pylist(entries, schema=INDEX_SCHEMA)


def _counts(record: Record | None) -> dict[Axis, int]:
    """Elements of a record along each axis; all 0 for a skipped row."""
    if record is None:
        return dict.fromkeys(AXES, 0)
    n_text, n_vision, n_answer = len(record.text_ids), len(record.vision_ids), len(record.answer_ids)
    return {"text": n_text, "vision": n_vision, "affinity": n_text * n_vision, "answer": n_answer}
