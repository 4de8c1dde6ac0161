"""A shard in memory, and records cut from it.

The arrays are decompressed once and kept in their types on disk (bfloat16 logits take half the memory of
float32 ones); a record is a slice, converted to float32. What needs no conversion shares the shard's memory:
copy a record before writing into it. Shape legend in `record` and `layout`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError, SampleNotFoundError
from emkd.storage.digest import NEXT_STEP
from emkd.storage.files import LocalFiles
from emkd.storage.index import ShardIndex
from emkd.storage.integrity import VerifiedStore
from emkd.storage.layout import AXES, ArrayLayout, Axis, array_layouts
from emkd.storage.manifest import Manifest
from emkd.storage.precision import decode_affinity, decode_logits
from emkd.storage.record import Record
from emkd.storage.table import OK, images_from_json


@dataclass(frozen=True, kw_only=True)
class DecodedShard:
    """The arrays of a shard, by name, and the index rows of its samples (skipped rows are left out)."""

    number: int
    manifest: Manifest
    layouts: tuple[ArrayLayout, ...]
    arrays: dict[str, NDArray[Any]]
    table: pa.Table

    def __len__(self) -> int:
        """Samples in the shard."""
        return len(self.table)

    @property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        return sum(array.nbytes for array in self.arrays.values())

    def record(self, i: int) -> Record:
        """The i-th sample of the shard, 0-based. SampleNotFoundError where it has fewer."""
        if not 0 <= i < len(self):
            raise SampleNotFoundError(f"sample {i} of shard {self.number}: it has {len(self)} samples")
        row = self.table.slice(i, 1).to_pylist()[0]
        at = {axis: slice(row[f"{axis}_offset"], row[f"{axis}_offset"] + row[f"{axis}_count"]) for axis in AXES}
        parts = {layout.name: self.arrays[layout.name][at[layout.axis]] for layout in self.layouts}
        precision = self.manifest.logits_precision
        for name in ("vision_logits", "answer_logits"):
            parts[name] = decode_logits(parts[name], precision)
        affinity = decode_affinity(parts.pop("affinity"), self.manifest.affinity_precision)
        return Record(
            key=row["key"],
            images=images_from_json(row["images"]),
            affinity=affinity.reshape(row["text_count"], row["vision_count"]),
            **parts,
        )


def read_shard(files: LocalFiles, index: ShardIndex, manifest: Manifest) -> DecodedShard:
    """Read all arrays of a committed shard, checked.

    DamagedCacheError where an object is missing or changed, or where the arrays are not the ones that the
    manifest and the index describe.
    """
    store = VerifiedStore(files, index.prefix, index.objects)
    where = files.where(index.prefix)
    lengths = _lengths(index.table)
    group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
    layouts, arrays = array_layouts(manifest), {}
    for layout in layouts:
        array = group[layout.name]
        if not isinstance(array, zarr.Array):
            raise DamagedCacheError(f"{where}/{layout.name}: not an array. {NEXT_STEP}")
        _check_array(where, array, layout, lengths[layout.axis])
        arrays[layout.name] = np.asarray(array[...])
    samples = index.table.filter(pc.equal(index.table["status"], OK))
    return DecodedShard(number=index.shard, manifest=manifest, layouts=layouts, arrays=arrays, table=samples)


def _lengths(table: pa.Table) -> dict[Axis, int]:
    """Elements along each axis of the shard's arrays, as the index has them."""
    return {axis: pc.sum(table[f"{axis}_count"]).as_py() or 0 for axis in AXES}


def _check_array(where: str, array: zarr.Array[Any], layout: ArrayLayout, length: int) -> None:
    found = (array.shape, array.dtype, array.attrs.get("precision"))
    expected = (layout.shape(length), layout.dtype, layout.attributes.get("precision"))
    if found != expected:
        raise DamagedCacheError(
            f"{where}/{layout.name}: shape, type and precision are {found}, expected {expected} from the "
            f"manifest and the index. {NEXT_STEP}"
        )
