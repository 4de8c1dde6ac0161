"""Which of the cache's samples a run trains on: those whose rows are in its data.

The same files need nothing but their fingerprint. Other files (moved, merged, a subset, another format) are compared by
what their rows say: the cache has a hash of each row's texts, and no image is read for it. Only where a text is there
more than once do the images have to say which row it is. A run so begins in seconds, whatever the images weigh.

That an image is the one that the teacher saw is found out when its row is read: the trainer compares each row's key. A
few rows, spread over the selection, are compared here, so that wrong data are noticed at once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emkd.errors import DataMismatchError
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache
from emkd.storage.index.table import TEXT_COLUMN

LOOKED_AT = 8  # rows whose images are compared at the start
PIECE = 1 << 16  # elements that are hashed at once

NO_SAMPLE, FOREIGN = -1, -2


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
        column, digest = cache.sample_column("key"), hashlib.sha256()
        keys = (column.take(numbers).to_pylist() for numbers in _pieces(self.numbers))
        rows = (piece.tolist() for piece in _pieces(self.rows))
        for text in _listing(keys, rows, [self.shard_sizes(cache)]):
            digest.update(text.encode())
        return digest.hexdigest()


def _pieces(values: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (values[start : start + PIECE] for start in range(0, len(values), PIECE))


def _listing(*lists: Iterable[list[Any]]) -> Iterator[str]:
    """The JSON text of several lists, [[...], [...]], in pieces, as each list comes in pieces."""
    for number, pieces in enumerate(lists):
        yield ", [" if number else "[["
        comma = ""
        for piece in pieces:
            yield comma + json.dumps(piece)[1:-1]
            comma = ", "
        yield "]"
    yield "]"


def select(cache: Cache, dataset: Dataset, log: Callable[[str], None]) -> Selection:
    """The samples of the cache that `dataset` has, told with counts.

    DataMismatchError where it has rows that the cache does not know, where it has none of its samples, or where a row
    that is looked at has other images than the teacher saw.
    """
    known = any(data.fingerprint == dataset.fingerprint for data in cache.manifest.datasets)
    chosen = _by_place(cache, dataset) if known else _by_content(cache, dataset, log)
    if not len(chosen.numbers):
        raise DataMismatchError(f"{dataset.data} has no row that the cache has a sample of. {_made_from(cache)}")
    n_used = len(np.unique(chosen.numbers))
    if n_used < cache.n_samples:
        log(f"{n_used} of the cache's {cache.n_samples} samples are in {dataset.data}")
    left = dataset.n_rows - len(chosen.rows)
    if left:
        log(f"{left} of {dataset.n_rows} rows of {dataset.data} have no sample in the cache: skipped, or not reached")
    _look_at_some(cache, dataset, chosen)
    return chosen


def _look_at_some(cache: Cache, dataset: Dataset, chosen: Selection) -> None:
    """The keys of a few rows. One that cannot be read now says nothing: it is counted when it is to be trained on."""
    n = len(chosen.rows)
    for place in sorted({n * i // LOOKED_AT for i in range(LOOKED_AT)}):
        row, number = int(chosen.rows[place]), int(chosen.numbers[place])
        found, expected = dataset.key(row), cache.sample_key(number)
        if found is not None and found != expected:
            raise DataMismatchError(
                f"row {row} (id {dataset.row(row).id!r}) of {dataset.data} is not what the teacher saw: its key is "
                f"{found[:12]}, the cache has {expected[:12]}. Its images are others than when they were cached: give "
                "the data (and the --image-root) that the cache was made from"
            )


def _by_place(cache: Cache, dataset: Dataset) -> Selection:
    """By what the plans say: a dataset's own rows, and those of earlier ones that were found in it."""
    manifest, numbers = cache.manifest, np.full(dataset.n_rows, -1, dtype=np.int64)
    sources = np.array([manifest.source(shard) for shard in cache.shards], dtype=np.int64)
    source = np.repeat(sources, cache.shard_sizes)  # of each sample
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


def _by_content(cache: Cache, dataset: Dataset, log: Callable[[str], None]) -> Selection:
    """By the hashes of texts, and by keys where these leave it open."""
    if cache.knows_texts:
        numbers, open_rows = _by_text(cache, list(dataset.text_hashes()))
        log(f"{dataset.data} is not a file that was cached; comparing all rows by their texts")
        if len(open_rows):
            log(f"{len(open_rows)} of {dataset.n_rows} rows have texts that repeat: reading the images of these")
    else:
        numbers, open_rows = np.full(dataset.n_rows, NO_SAMPLE, dtype=np.int64), np.arange(dataset.n_rows)
        log(
            f"{dataset.data} is not a file that was cached, and the cache was made by an emkd that kept no hashes of "
            "texts; comparing all rows by key, images included: this takes as long as reading all of them"
        )
    _by_key(cache, dataset, numbers, open_rows.tolist())
    foreign = np.flatnonzero(numbers == FOREIGN)
    if len(foreign) and _should_be_whole(cache):
        raise DataMismatchError(
            f"{dataset.data} is not the data of this cache: {len(foreign)} of its {dataset.n_rows} rows are not in it, "
            f"the first is row {foreign[0]} with key {(dataset.key(int(foreign[0])) or 'unknown')[:12]}. "
            f"{_made_from(cache)}"
        )
    return Selection.of(numbers)


def _by_text(cache: Cache, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(sample number of each row, NO_SAMPLE or FOREIGN; rows that only their images can tell).

    Open are rows whose text several rows of the cache or of the data have, or a row that the cache skipped.
    """
    cached = cache.sample_column(TEXT_COLUMN).to_pylist()
    skipped = set(cache.rows.skipped((TEXT_COLUMN,))[TEXT_COLUMN].to_pylist())
    number_of = {text: number for number, text in enumerate(cached)}
    ambiguous = _repeated(cached) | _repeated(texts) | skipped
    numbers = np.full(len(texts), NO_SAMPLE, dtype=np.int64)
    open_rows = []
    for row, text in enumerate(texts):
        if text == "":
            continue  # a row that cannot be read is nobody's
        if text in ambiguous and (text in number_of or text in skipped):
            open_rows.append(row)
        else:
            numbers[row] = number_of.get(text, FOREIGN)
    return numbers, np.array(open_rows, dtype=np.int64)


def _repeated(texts: Iterable[str]) -> set[str]:
    return {text for text, count in Counter(texts).items() if count > 1}


def _by_key(cache: Cache, dataset: Dataset, numbers: NDArray[np.int64], rows: Sequence[int]) -> None:
    """Fills in the numbers of these rows. Where the data repeat a row, the cache's samples of that key take turns."""
    if not rows:
        return
    by_key: dict[str, list[int]] = {}
    for number, cached in enumerate(cache.sample_keys):
        by_key.setdefault(cached, []).append(number)
    skipped = set(cache.rows.skipped(("key",))["key"].to_pylist())
    seen: Counter[str] = Counter()
    for row in rows:
        key = dataset.key(row)
        if key is not None and key in by_key:
            numbers[row] = by_key[key][seen[key] % len(by_key[key])]
            seen[key] += 1
        elif key is not None and key not in skipped:
            numbers[row] = FOREIGN


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
