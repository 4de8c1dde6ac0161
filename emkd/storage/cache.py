"""What readers use: open a cache, find a sample, read it.

    cache = Cache.open(uri)
    cache.record(cache.find("a1b2c3"))

Opening reads and checks four files (one, and each shard's index, with `partial`); a shard is checked when it is read.
Of the rows, what opening and finding do not need is decoded when it is first asked for (see `rows`). Samples are the
rows that were not skipped, numbered from 0 in plan order, so the samples of a shard are contiguous. A cache object may
be pickled to another process; it holds no open file.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from emkd.errors import CacheIncompleteError, DamagedCacheError, SampleNotFoundError
from emkd.storage.index.columns import Rows
from emkd.storage.index.commit import ShardIndex
from emkd.storage.index.find import find_sample
from emkd.storage.index.table import TEXT_COLUMN, images_from_json, with_all_columns
from emkd.storage.lifecycle.create import create_cache
from emkd.storage.lifecycle.seal import (
    Seal,
    Totals,
    check_tokenizer,
    read_committed,
    read_indexes,
    read_seal,
)
from emkd.storage.lifecycle.verify import Damage, verify
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import count_extensions, read_manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import TOKENIZER_NAME, committed_shards, index_name, table_name
from emkd.storage.objects.open import open_files
from emkd.storage.record import ImageSpan, Record
from emkd.storage.shards.buffers import Buffers
from emkd.storage.shards.reader import DecodedShard, read_shard

__all__ = ["Cache", "Damage", "SampleInfo", "create_cache", "verify"]

_SAMPLE_COLUMNS_DROPPED = ("status", "reason", "detail")
_INFO_COLUMNS = (
    "row", "id", "key", "shard", "text_count", "vision_count", "answer_count", "images", "retained_mass"
)  # fmt: skip
_SKIPPED_COLUMNS = ("row", "id", "key", TEXT_COLUMN, "reason", "detail", "shard")


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """What the index says of a sample. `number` is its own in this cache, `row` its place in the dataset."""

    number: int
    row: int
    id: str
    key: str
    shard: int
    n_text: int
    n_vision: int
    n_answer: int
    images: tuple[ImageSpan, ...]
    retained_mass: float | None


class Cache:
    """A cache that is open for reading. Use `Cache.open`."""

    def __init__(
        self,
        files: Files,
        manifest: Manifest,
        seal: Seal | None,
        rows: Rows,
        totals: Totals,
        window: int,
    ) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; expected at least 1 shard")
        self.files = files
        self.manifest = manifest
        self.seal = seal
        self.totals = totals
        self.rows = rows
        self._window = window
        self._decoded: OrderedDict[int, DecodedShard] = OrderedDict()
        self._buffers = Buffers()

    @classmethod
    def open(cls, uri: str | Path, partial: bool = False, *, window: int = 2) -> "Cache":
        """Open a cache, checking everything that is read for it.

        partial: open a cache that is not sealed too, with the shards that are committed now
        window:  decoded shards that `record` keeps in memory

        InputNotFoundError where there is no cache, CacheIncompleteError where it is not sealed,
        CacheVersionError where it is of a newer format, DamagedCacheError where a file is not as written.
        """
        files = open_files(uri)
        extensions = count_extensions(files)  # once: somebody may be adding one
        seal = read_seal(files, extensions)
        manifest = read_manifest(files, None if seal is None else lambda name: seal.check(files, name), extensions)
        if seal is not None:
            seal.check(files, TOKENIZER_NAME)
            name = table_name(extensions)
            rows = Rows.read(files.where(name), seal.check(files, name))
            return cls(files, manifest, seal, rows, seal.totals, window)
        committed = read_indexes(files, manifest, _committed(files, manifest, partial))
        return cls(files, manifest, None, Rows.of(committed.table), committed.totals, window)

    def __len__(self) -> int:
        return self.n_samples

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded shards: another process reads its own."""
        return self.__dict__ | {"_decoded": OrderedDict(), "_buffers": Buffers()}

    @property
    def sealed(self) -> bool:
        return self.seal is not None

    @cached_property
    def tokenizer_json(self) -> bytes:
        """The teacher's tokenizer.json. DamagedCacheError where it is not the one of the manifest."""
        if self.seal is not None:
            return self.seal.check(self.files, TOKENIZER_NAME)
        return check_tokenizer(self.files, self.manifest)

    @property
    def n_samples(self) -> int:
        return len(self.rows.samples)

    @cached_property
    def samples(self) -> pa.Table:
        """INDEX_SCHEMA of the samples in plan order, without status, reason and detail."""
        chosen = self.rows.table().filter(self.rows.is_sample)
        return chosen.drop_columns(list(_SAMPLE_COLUMNS_DROPPED)).combine_chunks()

    def sample_column(self, name: str) -> pa.ChunkedArray:
        """[samples] one column of `samples`, without a copy of the others."""
        return self.rows[name] if self.n_samples == len(self.rows) else self.rows[name].filter(self.rows.is_sample)

    @cached_property
    def sample_rows(self) -> NDArray[np.int64]:
        """The row of each sample in its dataset; ascending unless the cache was extended."""
        return self.rows.numbers("row")[self.rows.samples]

    @cached_property
    def sample_keys(self) -> list[str]:
        """The key of each sample. A key that repeats is a sample whose content repeats in the data."""
        return self.sample_column("key").to_pylist()

    def sample_key(self, i: int) -> str:
        """The key of sample `i`. SampleNotFoundError where there is no such sample."""
        return str(self.rows["key"][self._place(i)].as_py())

    @property
    def knows_texts(self) -> bool:
        """Whether each row has its text_sha256: older versions wrote none."""
        return bool(self.rows[TEXT_COLUMN].null_count == 0)

    @cached_property
    def skipped(self) -> pa.Table:
        """The rows that have no record, with _SKIPPED_COLUMNS."""
        return self.rows.skipped(_SKIPPED_COLUMNS)

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the shards that can be read, ascending: all of the plan, where the cache is sealed."""
        return tuple(sorted(pc.unique(self.rows["shard"]).to_pylist()))

    @cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each of `shards` (0 where all rows were skipped)."""
        return tuple(len(numbers) for numbers in self._samples_by_shard.values())

    def samples_of_shard(self, shard: int) -> range:
        """The sample numbers of a shard. SampleNotFoundError for one that is not in `shards`."""
        if shard not in self._samples_by_shard:
            raise SampleNotFoundError(f"{self.files.root}: no shard {shard} among {len(self.shards)} shards")
        return self._samples_by_shard[shard]

    def rows_of_shard(self, shard: int) -> Sequence[int]:
        """The dataset rows of a shard, skipped ones included. ValueError for one that the plan lacks."""
        return self.manifest.rows(shard)

    def find(self, key_or_id: str) -> int:
        """Number of the sample with this key, id, or unique beginning of a key (6 characters or more).

        SampleNotFoundError where there is none (with the reason, if the row was skipped); UsageError where
        there are several, with their keys.
        """
        return find_sample(self.rows, key_or_id, str(self.files.root))

    def sample_info(self, i: int) -> SampleInfo:
        """What the index says of sample `i`. SampleNotFoundError where there is no such sample."""
        place = self._place(i)
        row = {name: self.rows[name][place].as_py() for name in _INFO_COLUMNS}
        return SampleInfo(
            number=i,
            row=row["row"],
            id=row["id"],
            key=row["key"],
            shard=row["shard"],
            n_text=row["text_count"],
            n_vision=row["vision_count"],
            n_answer=row["answer_count"],
            images=images_from_json(row["images"]),
            retained_mass=row["retained_mass"],
        )

    def shard_index(self, shard: int) -> ShardIndex:
        """The index of a shard, read and checked now. Errors as samples_of_shard, and DamagedCacheError."""
        self.samples_of_shard(shard)
        data = None if self.seal is None else self.seal.check(self.files, index_name(shard))
        index = read_committed(self.files, shard, self.manifest, data, vouched=data is not None)
        if not with_all_columns(index.table).equals(self.rows.of_shard(shard)):
            raise DamagedCacheError(
                f"{self.files.where(index_name(shard))}: other rows than when the cache was opened: the shard was made "
                "anew since; open the cache again"
            )
        return index

    def read_shard(self, shard: int) -> DecodedShard:
        """All arrays of a shard, read and checked now. Errors as shard_index."""
        return read_shard(self.files, self.shard_index(shard), self.manifest)

    def record(self, i: int) -> Record:
        """Sample `i`. Keeps the last `window` shards, so reading shard by shard decodes each one once."""
        shard = int(self._shard_of_sample[self._checked_number(i)])
        if shard in self._decoded:
            self._decoded.move_to_end(shard)
        else:
            while len(self._decoded) >= self._window:  # before reading: it bounds the memory
                _, oldest = self._decoded.popitem(last=False)
                self._buffers.clear()
                oldest.release(self._buffers)
            self._decoded[shard] = read_shard(self.files, self.shard_index(shard), self.manifest, self._buffers)
        return self._decoded[shard].record(i - self.samples_of_shard(shard).start)

    @cached_property
    def _shard_of_sample(self) -> NDArray[np.int32]:
        return self.rows.numbers("shard")[self.rows.samples]

    @cached_property
    def _samples_by_shard(self) -> dict[int, range]:
        starts = np.searchsorted(self._shard_of_sample, self.shards, side="left").tolist()
        ends = np.searchsorted(self._shard_of_sample, self.shards, side="right").tolist()
        return {shard: range(a, b) for shard, a, b in zip(self.shards, starts, ends, strict=True)}

    def _checked_number(self, i: int) -> int:
        if not 0 <= i < self.n_samples:
            raise SampleNotFoundError(f"{self.files.root}: no sample {i}, it has {self.n_samples} samples")
        return i

    def _place(self, i: int) -> int:
        """Which of the rows sample `i` is."""
        return int(self.rows.samples[self._checked_number(i)])


def _committed(files: Files, manifest: Manifest, partial: bool) -> list[int]:
    """Numbers of the committed shards; CacheIncompleteError unless `partial`."""
    committed = sorted(set(committed_shards(files)) & set(manifest.shards))
    if not partial:
        raise CacheIncompleteError(
            f"{files.root}: not sealed, {len(committed)} of {len(manifest.shards)} shards are committed; run the same "
            "cache-teacher command again (it does only what is missing), or use --partial to train on what "
            "is there"
        )
    return committed
