"""Which of the cache's samples a run trains on: those whose rows are in its data.

The same files need nothing but their fingerprint: each row is checked by its key when it is read. Other files
(moved, merged, a subset, another format) are compared by key once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emkd.errors import DataMismatchError
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Selection:
    """[n] sample numbers of the cache, ascending, and the row of the dataset that each of them is."""

    numbers: NDArray[np.int64]
    rows: NDArray[np.int64]

    def shard_sizes(self, cache: Cache) -> list[int]:
        """Selected samples of each of the cache's shards."""
        ends = np.cumsum(cache.shard_sizes)
        return np.diff(np.searchsorted(self.numbers, ends, side="left"), prepend=0).tolist()


def select(cache: Cache, dataset: Dataset, log: Callable[[str], None]) -> Selection:
    """The samples of the cache that `dataset` has, told with counts.

    DataMismatchError where it has rows that the cache does not know, or where it has none of its samples.
    """
    known = any(data.fingerprint == dataset.fingerprint for data in cache.manifest.datasets)
    if not known:
        log(f"{dataset.data} is not a file that was cached; comparing all rows by key")
    chosen = _by_place(cache, dataset.fingerprint) if known else _by_key(cache, dataset, log)
    if not len(chosen.numbers):
        raise DataMismatchError(f"{dataset.data} has no row that the cache has a sample of. {_made_from(cache)}")
    if len(chosen.numbers) < cache.n_samples:
        log(f"{len(chosen.numbers)} of the cache's {cache.n_samples} samples are in {dataset.data}")
    left = dataset.n_rows - len(np.unique(chosen.rows))
    if left:
        log(f"{left} of {dataset.n_rows} rows of {dataset.data} have no sample in the cache: skipped, or not reached")
    return chosen


def _by_place(cache: Cache, fingerprint: str) -> Selection:
    """By what the plans say: a dataset's own rows, and those of earlier ones that were found in it."""
    manifest = cache.manifest
    sources = {shard: manifest.source(shard) for shard in cache.shards}
    source = np.array([sources[shard] for shard in cache.samples["shard"].to_pylist()], dtype=np.int64)
    rows = np.full(len(source), -1, dtype=np.int64)
    for number, dataset in enumerate(manifest.datasets):
        if dataset.fingerprint == fingerprint:
            own = source == number
            rows[own] = cache.sample_rows[own]
    for extension in manifest.extensions:
        for run in extension.found if extension.dataset.fingerprint == fingerprint else ():
            place = cache.sample_rows - run.source_row
            there = (source == run.source) & (place >= 0) & (place < run.count) & (rows < 0)
            rows[there] = run.row + place[there]
    numbers = np.flatnonzero(rows >= 0)
    return Selection(numbers=numbers, rows=rows[numbers])


def _by_key(cache: Cache, dataset: Dataset, log: Callable[[str], None]) -> Selection:
    found: dict[str, int] = {}
    for row, key in dataset.keyed_rows():
        if key is not None:
            found.setdefault(key, row)
    keys = cache.sample_keys
    known = {*keys, *cache.skipped["key"].to_pylist()}
    foreign = [key for key in found if key not in known]
    if foreign and _should_be_whole(cache):
        raise DataMismatchError(
            f"{dataset.data} is not the data of this cache: {len(foreign)} of its {dataset.n_rows} rows are not in it, "
            f"the first is row {found[foreign[0]]} with key {foreign[0][:12]}. {_made_from(cache)}"
        )
    pairs = [(number, found[key]) for number, key in enumerate(keys) if key in found]
    numbers, rows = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Selection(numbers=numbers, rows=rows)


def _should_be_whole(cache: Cache) -> bool:
    """A cache that is not sealed, or was limited to the first rows, does not know all rows of its own data."""
    manifest = cache.manifest
    newest = manifest.extensions[-1] if manifest.extensions else None
    n_rows, dataset = (manifest.plan.n_rows, manifest.dataset) if newest is None else (newest.n_rows, newest.dataset)
    return cache.sealed and n_rows == dataset.n_rows


def _made_from(cache: Cache) -> str:
    names = ", ".join(file.name for dataset in cache.manifest.datasets for file in dataset.files)
    return (
        f"The cache was made from {names}; name that data, or a part of it, or add these rows with `emkd cache-teacher "
        "--extend`"
    )
