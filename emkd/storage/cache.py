"""The reader's interface: open a cache, find a sample, read it.

    cache = Cache.open(uri)
    cache.record(cache.find("a1b2c3"))

Opening reads and checks four files (with `partial`: one, and each shard's index); a shard is checked when it is read.
Columns of the rows that opening and finding do not need are decoded on first use (see `index/columns`). Samples are the
rows that were not skipped, numbered from 0 in plan order, so the samples of a shard are contiguous. `number` is always
such a sample number, `row` a row of the dataset, and `position` the index of a row in `Cache.rows`. You may pickle a
cache object to another process; it holds no open file.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from emkd.errors import CacheIncompleteError, DamagedCacheError, SampleNotFoundError
from emkd.storage.basis import Basis, read_basis
from emkd.storage.index.columns import Rows
from emkd.storage.index.commit import ShardIndex
from emkd.storage.index.committed import Totals, read_committed, read_indexes
from emkd.storage.index.find import find_sample
from emkd.storage.index.sample_info import SampleInfo
from emkd.storage.index.table import TEXT_COLUMN, with_all_columns
from emkd.storage.lifecycle.create import create_cache
from emkd.storage.lifecycle.seal import Seal, read_seal
from emkd.storage.lifecycle.verify import Damage, verify
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import count_extensions, read_manifest, read_tokenizer
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import TOKENIZER_NAME, committed_shards, index_name, table_name
from emkd.storage.objects.open import open_files
from emkd.storage.record import Record
from emkd.storage.shards.reader import DecodedShard, read_shard
from emkd.storage.shards.window import ShardWindow

__all__ = ["Cache", "Damage", "SampleInfo", "create_cache", "verify"]

_SAMPLE_COLUMNS_DROPPED = ("status", "reason", "detail")
_SKIPPED_COLUMNS = ("row", "id", "key", TEXT_COLUMN, "reason", "detail", "shard")


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
        self.files = files
        self.manifest = manifest
        self.seal = seal
        self.totals = totals
        self.rows = rows
        self._decoded = ShardWindow(window)

    @classmethod
    def open(cls, uri: str | Path, partial: bool = False, *, window: int = 2) -> "Cache":
        """Open a cache and check every file that this reads.

        partial: also open a cache that is not sealed, with the shards that are committed now
        window:  decoded shards that `record` keeps in memory

        Raises InputNotFoundError if there is no cache, CacheIncompleteError if it is not sealed, CacheVersionError if
        it is of a newer format, and DamagedCacheError if a file is not as it was written.
        """
        files = open_files(uri)
        extensions = count_extensions(files)  # once: another process may add one meanwhile
        seal = read_seal(files, extensions)
        manifest = read_manifest(files, None if seal is None else lambda name: seal.check(files, name), extensions)
        if seal is not None:
            seal.check(files, TOKENIZER_NAME)
            name = table_name(extensions)
            rows = Rows.read(files.where(name), seal.check(files, name))
            _check_plan(files.where(name), rows, manifest)
            return cls(files, manifest, seal, rows, seal.totals, window)
        committed = read_indexes(files, manifest, _committed(files, manifest, partial))
        return cls(files, manifest, None, Rows.of(committed.table), committed.totals, window)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the basis out: a loader's worker, which returns codes, does not need it."""
        return {name: value for name, value in vars(self).items() if name != "basis"}

    def __len__(self) -> int:
        return self.n_samples

    @property
    def sealed(self) -> bool:
        """Whether the cache is sealed: every shard of the plan is committed."""
        return self.seal is not None

    @cached_property
    def tokenizer_json(self) -> bytes:
        """The teacher's tokenizer.json. Raises DamagedCacheError if it is not as the manifest or the seal says."""
        if self.seal is not None:
            return self.seal.check(self.files, TOKENIZER_NAME)
        return read_tokenizer(self.files, self.manifest)

    @cached_property
    def basis(self) -> Basis | None:
        """The basis of the codes, None if the cache has none. Raises DamagedCacheError if it is missing or changed."""
        identity = self.manifest.basis
        return None if identity is None else read_basis(self.files, identity)

    def affinity(self, record: Record) -> NDArray[np.float32]:
        """Return the affinity of a record of this cache, [L, Nt], as stored or computed from its codes."""
        if record.affinity is not None:
            return record.affinity
        if self.basis is None or record.text_codes is None or record.vision.codes is None:
            raise ValueError("the record has neither an affinity nor codes of its text; it is of another cache")
        return self.basis.affinity(record.text_codes, record.vision.codes)

    @property
    def n_samples(self) -> int:
        """The number of samples: rows that were not skipped."""
        return len(self.rows.samples)

    @cached_property
    def samples(self) -> pa.Table:
        """The index rows of the samples in plan order: INDEX_SCHEMA without status, reason and detail."""
        chosen = self.rows.table().filter(self.rows.is_sample)
        return chosen.drop_columns(list(_SAMPLE_COLUMNS_DROPPED)).combine_chunks()

    def sample_column(self, name: str) -> pa.ChunkedArray:
        """Return one column of `samples`, [samples], without decoding the other columns."""
        return self.rows[name] if self.n_samples == len(self.rows) else self.rows[name].filter(self.rows.is_sample)

    @cached_property
    def sample_rows(self) -> NDArray[np.int64]:
        """[samples] the row of each sample in its dataset; ascending unless the cache was extended."""
        return self.rows.numbers("row")[self.rows.samples]

    @cached_property
    def sample_keys(self) -> list[str]:
        """[samples] the key of each sample. A key repeats if the content of a sample repeats in the data."""
        return self.sample_column("key").to_pylist()

    def sample_key(self, number: int) -> str:
        """Return the key of a sample. Raises SampleNotFoundError if there is no such sample."""
        position = int(self.rows.samples[self._checked_number(number)])
        return str(self.rows["key"][position].as_py())

    @property
    def knows_texts(self) -> bool:
        """Whether the text_sha256 of every row is known; older versions did not write it."""
        return bool(self.rows[TEXT_COLUMN].null_count == 0)

    @cached_property
    def skipped(self) -> pa.Table:
        """The skipped rows, with _SKIPPED_COLUMNS."""
        return self.rows.skipped(_SKIPPED_COLUMNS)

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """The shards that can be read, ascending; all shards of the plan if the cache is sealed."""
        return tuple(sorted(pc.unique(self.rows["shard"]).to_pylist()))

    @cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        """The number of samples of each of `shards`; 0 if all its rows were skipped."""
        return tuple(len(numbers) for numbers in self._samples_by_shard.values())

    def samples_of_shard(self, shard: int) -> range:
        """Return the sample numbers of a shard. Raises SampleNotFoundError if it is not in `shards`."""
        if shard not in self._samples_by_shard:
            raise SampleNotFoundError(f"{self.files.root}: no shard {shard} among {len(self.shards)} shards")
        return self._samples_by_shard[shard]

    def rows_of_shard(self, shard: int) -> Sequence[int]:
        """Return the dataset rows of a shard, including skipped rows. Raises ValueError if the plan lacks the shard."""
        return self.manifest.rows(shard)

    def find(self, key_or_id: str) -> int:
        """Return the number of the sample with this key, id, or unique beginning of a key (6 characters or more).

        Raises SampleNotFoundError if there is none (with the reason if the row was skipped), and UsageError, which
        lists the keys, if there are several.
        """
        return find_sample(self.rows, key_or_id, str(self.files.root))

    def sample_info(self, number: int) -> SampleInfo:
        """Return a sample as its index describes it. Raises SampleNotFoundError if there is no such sample."""
        return SampleInfo.of(self.rows, self._checked_number(number))

    def shard_index(self, shard: int) -> ShardIndex:
        """Read and check the index of a shard.

        Raises SampleNotFoundError if the shard is not in `shards`, and DamagedCacheError if the index is not as it was
        written or has changed since the cache was opened.
        """
        self.samples_of_shard(shard)
        data = None if self.seal is None else self.seal.check(self.files, index_name(shard))
        index = read_committed(self.files, shard, self.manifest, data, vouched=data is not None)
        if not with_all_columns(index.table).equals(self.rows.of_shard(shard)):
            raise DamagedCacheError(
                f"{self.files.where(index_name(shard))}: its rows have changed since the cache was opened: the shard "
                "was rewritten; open the cache again"
            )
        return index

    def read_shard(self, shard: int) -> DecodedShard:
        """Read and check all arrays of a shard. Raises as shard_index."""
        return read_shard(self.files, self.shard_index(shard), self.manifest)

    def record(self, number: int) -> Record:
        """Read a sample. Keeps the last `window` shards, so that reading shard by shard decodes each shard once.

        Raises SampleNotFoundError if there is no such sample, and DamagedCacheError if its shard is damaged.
        """
        shard = int(self._shard_of_sample[self._checked_number(number)])
        decoded = self._decoded.get(
            shard, lambda buffers: read_shard(self.files, self.shard_index(shard), self.manifest, buffers)
        )
        return decoded.record(number - self.samples_of_shard(shard).start)

    @cached_property
    def _shard_of_sample(self) -> NDArray[np.int32]:
        """[samples] the shard of each sample."""
        return self.rows.numbers("shard")[self.rows.samples]

    @cached_property
    def _samples_by_shard(self) -> dict[int, range]:
        """The sample numbers of each of `shards`."""
        starts = np.searchsorted(self._shard_of_sample, self.shards, side="left").tolist()
        ends = np.searchsorted(self._shard_of_sample, self.shards, side="right").tolist()
        return {shard: range(a, b) for shard, a, b in zip(self.shards, starts, ends, strict=True)}

    def _checked_number(self, number: int) -> int:
        if not 0 <= number < self.n_samples:
            raise SampleNotFoundError(f"{self.files.root}: no sample {number}, it has {self.n_samples} samples")
        return number


def _check_plan(where: str, rows: Rows, manifest: Manifest) -> None:
    """Check that a consolidated index has the rows of all shards, shard after shard. Raises DamagedCacheError."""
    shards, counts = np.unique(rows.numbers("shard"), return_counts=True)
    if len(rows) == manifest.n_rows and (np.diff(rows.numbers("shard")) >= 0).all():
        planned = [shard for shard in manifest.shards if manifest.n_rows_of(shard)]
        if shards.tolist() == planned and counts.tolist() == list(map(manifest.n_rows_of, planned)):
            return
    raise DamagedCacheError(f"{where}: its rows are not the rows of the plan. {NEXT_STEP}")


def _committed(files: Files, manifest: Manifest, partial: bool) -> list[int]:
    """Return the committed shards of a cache that is not sealed. Raises CacheIncompleteError unless `partial`."""
    committed = sorted(set(committed_shards(files)) & set(manifest.shards))
    if not partial:
        raise CacheIncompleteError(
            f"{files.root}: not sealed, {len(committed)} of {len(manifest.shards)} shards are committed; run the same "
            "cache-teacher command again (it computes only the missing shards), or use --partial to train on the "
            "committed shards"
        )
    return committed
