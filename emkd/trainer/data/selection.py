"""Which of the cache's samples a run trains on: those whose rows are in its data.

If the files are those that were cached, their fingerprint is enough. Other files (moved, merged, a subset, another
format) are compared by content: the cache has a hash of each row's texts, so no image is read for that. Images are read
only for rows whose text occurs more than once. A run therefore starts in seconds, independent of the size of the
images.

Whether an image is the one that the teacher saw is checked when its row is read: the trainer compares each row's key. A
few rows, spread over the selection, are checked here as well, so that wrong data are noticed immediately.
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

N_CHECKED = 8  # rows whose images are compared at the start
PIECE = 1 << 16  # elements that are hashed at a time

NO_SAMPLE, FOREIGN = -1, -2


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples of a run: [n] sample numbers of the cache, ascending, and [n] rows of the dataset.

    A row that occurs several times in the data is selected as often.
    """

    numbers: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, numbers: NDArray[np.int64]) -> "Selection":
        """Make a selection from the sample number of each row of a dataset [rows], negative for a row without one."""
        rows = np.flatnonzero(numbers >= 0)
        order = np.argsort(numbers[rows], kind="stable")
        return cls(numbers=numbers[rows][order], rows=rows[order])

    def shard_sizes(self, cache: Cache) -> list[int]:
        """Return the number of selected samples of each of the cache's shards."""
        ends = np.cumsum(cache.shard_sizes)
        return np.diff(np.searchsorted(self.numbers, ends, side="left"), prepend=0).tolist()

    def sha256(self, cache: Cache) -> str:
        """Return a hash of the selection, in order: the content and shard of each element, and its row."""
        column, digest = cache.sample_column("key"), hashlib.sha256()
        keys = (column.take(numbers).to_pylist() for numbers in _pieces(self.numbers))
        rows = (piece.tolist() for piece in _pieces(self.rows))
        for text in _listing(keys, rows, [self.shard_sizes(cache)]):
            digest.update(text.encode())
        return digest.hexdigest()


def _pieces(values: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (values[start : start + PIECE] for start in range(0, len(values), PIECE))


def _listing(*lists: Iterable[list[Any]]) -> Iterator[str]:
    """Yield the JSON text of several lists, [[...], [...]], piece by piece; each list comes in pieces."""
    for number, pieces in enumerate(lists):
        yield ", [" if number else "[["
        comma = ""
        for piece in pieces:
            yield comma + json.dumps(piece)[1:-1]
            comma = ", "
        yield "]"
    yield "]"


def select(cache: Cache, dataset: Dataset, log: Callable[[str], None]) -> Selection:
    """Return the samples of the cache that are in `dataset`, and log how many.

    Raises DataMismatchError if the dataset has rows that are unknown to the cache, if it has none of the cache's
    samples, or if one of the checked rows has other images than the teacher saw.
    """
    known = any(data.fingerprint == dataset.fingerprint for data in cache.manifest.datasets)
    chosen = _by_plan(cache, dataset) if known else _by_content(cache, dataset, log)
    if not len(chosen.numbers):
        raise DataMismatchError(f"no row of {dataset.data} has a sample in the cache. {_made_from(cache)}")
    n_used = len(np.unique(chosen.numbers))
    if n_used < cache.n_samples:
        log(f"{n_used} of the cache's {cache.n_samples} samples are in {dataset.data}")
    left = dataset.n_rows - len(chosen.rows)
    if left:
        log(
            f"{left} of {dataset.n_rows} rows of {dataset.data} have no sample in the cache: the job skipped them, or "
            "did not reach them"
        )
    _check_some_keys(cache, dataset, chosen)
    return chosen


def _check_some_keys(cache: Cache, dataset: Dataset, chosen: Selection) -> None:
    """Compare the keys of a few rows. A row that cannot be read passes here: it is counted when it is trained on."""
    n = len(chosen.rows)
    for element in sorted({n * i // N_CHECKED for i in range(N_CHECKED)}):
        row, number = int(chosen.rows[element]), int(chosen.numbers[element])
        found, expected = dataset.key(row), cache.sample_key(number)
        if found is not None and found != expected:
            raise DataMismatchError(
                f"row {row} (id {dataset.row(row).id!r}) of {dataset.data} is not what the teacher saw: its key is "
                f"{found[:12]}, the cache has {expected[:12]}. Its images differ from those that were cached: use the "
                "data (and the --image-root) that the cache was made from"
            )


def _by_plan(cache: Cache, dataset: Dataset) -> Selection:
    """Select by the cache's plans: the rows of this dataset, and rows of earlier datasets that were found in it."""
    manifest, numbers = cache.manifest, np.full(dataset.n_rows, -1, dtype=np.int64)
    sources = np.array([manifest.source(shard) for shard in cache.shards], dtype=np.int64)
    source = np.repeat(sources, cache.shard_sizes)  # of each sample
    for number, known in enumerate(manifest.datasets):
        own = np.flatnonzero(source == number)
        if known.fingerprint == dataset.fingerprint:
            numbers[cache.sample_rows[own]] = own
    for extension in manifest.extensions:
        for run in extension.found if extension.dataset.fingerprint == dataset.fingerprint else ():
            offset = cache.sample_rows - run.source_row
            found = np.flatnonzero((source == run.source) & (offset >= 0) & (offset < run.count))
            numbers[run.row + offset[found]] = found
    return Selection.of(numbers)


def _by_content(cache: Cache, dataset: Dataset, log: Callable[[str], None]) -> Selection:
    """Select by the hashes of texts, and by keys for rows whose text is not unique."""
    if cache.knows_texts:
        numbers, open_rows = _by_text(cache, list(dataset.text_hashes()))
        log(f"{dataset.data} is not one of the cached files; comparing all rows by their texts")
        if len(open_rows):
            log(f"{len(open_rows)} of {dataset.n_rows} rows have texts that occur more than once: reading their images")
    else:
        numbers, open_rows = np.full(dataset.n_rows, NO_SAMPLE, dtype=np.int64), np.arange(dataset.n_rows)
        log(
            f"{dataset.data} is not one of the cached files, and the cache was made by an older emkd that stored no "
            "hashes of texts; comparing all rows by key, which reads every image"
        )
    _by_key(cache, dataset, numbers, open_rows.tolist())
    foreign = np.flatnonzero(numbers == FOREIGN)
    if len(foreign) and _should_be_whole(cache):
        raise DataMismatchError(
            f"{dataset.data} is not the data of this cache: {len(foreign)} of its {dataset.n_rows} rows are not in it; "
            f"the first is row {foreign[0]} with key {(dataset.key(int(foreign[0])) or 'unknown')[:12]}. "
            f"{_made_from(cache)}"
        )
    return Selection.of(numbers)


def _by_text(cache: Cache, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (sample number of each row, NO_SAMPLE or FOREIGN; rows whose images have to decide).

    They decide if several rows of the cache or of the data have the same text, or a row that the cache skipped has it.
    """
    cached = cache.sample_column(TEXT_COLUMN).to_pylist()
    skipped = set(cache.rows.skipped((TEXT_COLUMN,))[TEXT_COLUMN].to_pylist())
    number_of = {text: number for number, text in enumerate(cached)}
    ambiguous = _repeated(cached) | _repeated(texts) | skipped
    numbers = np.full(len(texts), NO_SAMPLE, dtype=np.int64)
    open_rows = []
    for row, text in enumerate(texts):
        if text == "":
            continue  # a row that cannot be read has no sample
        if text in ambiguous and (text in number_of or text in skipped):
            open_rows.append(row)
        else:
            numbers[row] = number_of.get(text, FOREIGN)
    return numbers, np.array(open_rows, dtype=np.int64)


def _repeated(texts: Iterable[str]) -> set[str]:
    return {text for text, count in Counter(texts).items() if count > 1}


def _by_key(cache: Cache, dataset: Dataset, numbers: NDArray[np.int64], rows: Sequence[int]) -> None:
    """Fill in the numbers of these rows. Rows with the same key take the cache's samples of that key in turn."""
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
    """Whether the cache knows all rows of its data: it is sealed, and not limited to the first rows of a dataset."""
    manifest = cache.manifest
    reached = Counter({manifest.dataset.fingerprint: manifest.plan.n_rows})
    for extension in manifest.extensions:
        reached |= Counter({extension.dataset.fingerprint: extension.n_rows})  # the larger one
    return cache.sealed and all(reached[dataset.fingerprint] == dataset.n_rows for dataset in manifest.datasets)


def _made_from(cache: Cache) -> str:
    names = ", ".join(file.name for dataset in cache.manifest.datasets for file in dataset.files)
    return (
        f"The cache was made from {names}: use that data or a part of it, or add these rows to the cache with `emkd "
        "cache-teacher --extend`"
    )
