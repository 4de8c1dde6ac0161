"""Which of the cache's samples a run trains on: those whose rows are in its data.

The same files need nothing but their fingerprint: each row is checked by its key when it is read. Other files
(moved, merged, a subset, another format) are compared by key once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emkd.errors import DataMismatchError
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Selection:
    """[n] sample numbers of the cache, ascending, and the row of the dataset that each of them is. A row that the data
    repeat is there as often as in the data."""

    numbers: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, numbers: NDArray[np.int64]) -> "Selection":
        """From the sample number of each row of a dataset, -1 where the cache has none."""
        rows = np.flatnonzero(numbers >= 0)
        order = np.argsort(numbers[rows], kind="stable")
        return cls(numbers=numbers[rows][order], rows=rows[order])

    def shard_sizes(self, cache: Cache) -> list[int]:
        """Selected samples of each of the cache's shards."""
        ends = np.cumsum(cache.shard_sizes)
        return np.diff(np.searchsorted(self.numbers, ends, side="left"), prepend=0).tolist()

    def sha256(self, cache: Cache) -> str:
        """Hash of what is trained on, in its order: the content and shard of each element, and its row."""
        keys, sizes = cache.sample_keys, self.shard_sizes(cache)
        listing = [[keys[number] for number in self.numbers.tolist()], self.rows.tolist(), sizes]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def select(cache: Cache, dataset: Dataset, log: Callable[[str], None]) -> Selection:
    """The samples of the cache that `dataset` has, told with counts.

    DataMismatchError where it has rows that the cache does not know, or where it has none of its samples.
    """
    known = any(data.fingerprint == dataset.fingerprint for data in cache.manifest.datasets)
    if not known:
        log(f"{dataset.data} is not a file that was cached; comparing all rows by key")
    chosen = _by_place(cache, dataset) if known else _by_key(cache, dataset)
    if not len(chosen.numbers):
        raise DataMismatchError(f"{dataset.data} has no row that the cache has a sample of. {_made_from(cache)}")
    n_used = len(np.unique(chosen.numbers))
    if n_used < cache.n_samples:
        log(f"{n_used} of the cache's {cache.n_samples} samples are in {dataset.data}")
    left = dataset.n_rows - len(chosen.rows)
    if left:
        log(f"{left} of {dataset.n_rows} rows of {dataset.data} have no sample in the cache: skipped, or not reached")
    return chosen


def _by_place(cache: Cache, dataset: Dataset) -> Selection:
    """By what the plans say: a dataset's own rows, and those of earlier ones that were found in it."""
    manifest, numbers = cache.manifest, np.full(dataset.n_rows, -1, dtype=np.int64)
    sources = {shard: manifest.source(shard) for shard in cache.shards}
    source = np.array([sources[shard] for shard in cache.samples["shard"].to_pylist()], dtype=np.int64)
    for number, known in enumerate(manifest.datasets):
        own = np.flatnonzero(source == number)
        if known.fingerprint == dataset.fingerprint:
            numbers[cache.sample_rows[own]] = own
    for extension in manifest.extensions:
        for run in extension.found if extension.dataset.fingerprint == dataset.fingerprint else ():
            place = cache.sample_rows - run.source_row
            there = np.flatnonzero((source == run.source) & (place >= 0) & (place < run.count))
            numbers[run.row + place[there]] = there
    return Selection.of(numbers)


def _by_key(cache: Cache, dataset: Dataset) -> Selection:
    """Where the data repeat a row, the cache's samples of that key take turns."""
    by_key: dict[str, list[int]] = {}
    for number, cached in enumerate(cache.sample_keys):
        by_key.setdefault(cached, []).append(number)
    skipped = set(cache.skipped["key"].to_pylist())
    numbers = np.full(dataset.n_rows, -1, dtype=np.int64)
    seen: Counter[str] = Counter()
    foreign: list[tuple[int, str]] = []
    for row, key in dataset.keyed_rows():
        if key is not None and key in by_key:
            numbers[row] = by_key[key][seen[key] % len(by_key[key])]
            seen[key] += 1
        elif key is not None and key not in skipped:
            foreign.append((row, key))
    if foreign and _should_be_whole(cache):
        first, unknown = foreign[0]
        raise DataMismatchError(
            f"{dataset.data} is not the data of this cache: {len(foreign)} of its {dataset.n_rows} rows are not in it, "
            f"the first is row {first} with key {unknown[:12]}. {_made_from(cache)}"
        )
    return Selection.of(numbers)


def _should_be_whole(cache: Cache) -> bool:
    """A cache that is not sealed, or was limited to the first rows of a dataset, does not know all rows of its data."""
    manifest = cache.manifest
    reached = Counter({manifest.dataset.fingerprint: manifest.plan.n_rows})
    for extension in manifest.extensions:
        reached |= Counter({extension.dataset.fingerprint: extension.n_rows})  # the larger one
    return cache.sealed and all(reached[dataset.fingerprint] == dataset.n_rows for dataset in manifest.datasets)


def _made_from(cache: Cache) -> str:
    names = ", ".join(file.name for dataset in cache.manifest.datasets for file in dataset.files)
    return (
        f"The cache was made from {names}; name that data, or a part of it, or add these rows with `emkd cache-teacher "
        "--extend`"
    )
