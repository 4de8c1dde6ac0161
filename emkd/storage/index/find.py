"""From what a user types to a sample: a key, an id, or the beginning of a key."""

from typing import NoReturn

import numpy as np
import pyarrow.compute as pc

from emkd.errors import SampleNotFoundError, UsageError
from emkd.storage.index.columns import Rows, as_numpy, prefix_range, text_scalar

MIN_PREFIX = 6
_SHOWN = 10


def find_sample(rows: Rows, key_or_id: str, where: str) -> int:
    """Number of the sample among `rows` with this key, id, or unique beginning of a key.

    A key that several rows have names the same content, so the first of them is the answer; an id that
    several rows have is a UsageError that lists their keys, as is a beginning of several keys.
    SampleNotFoundError where there is none, with the reason if it is among the skipped rows.
    """
    begins = _with_beginning(rows, key_or_id)
    with_key = [place for place in begins if _text(rows, "key", place) == key_or_id]
    same_key = _numbers(rows, with_key)
    if same_key:
        return same_key[0]
    with_id = as_numpy(pc.indices_nonzero(pc.equal(rows["id"], text_scalar(key_or_id)))).tolist() if key_or_id else []
    same_id = _numbers(rows, with_id)
    if len(same_id) > 1:
        _ambiguous(rows, same_id, f"{where}: {len(same_id)} samples have the id {key_or_id!r}")
    if same_id:
        return same_id[0]
    if len(key_or_id) >= MIN_PREFIX:
        numbers = _numbers(rows, begins)
        if len({_key(rows, number) for number in numbers}) > 1:
            _ambiguous(rows, numbers, f"{where}: {len(numbers)} keys begin with {key_or_id!r}")
        if numbers:
            return numbers[0]
    _not_found(rows, sorted({*with_key, *with_id}), key_or_id, where)


def _with_beginning(rows: Rows, text: str) -> list[int]:
    """Rows whose key begins with `text`, ascending; none for an empty one. Few keys have the same first bytes: these
    alone are compared whole."""
    if not text:
        return []
    low, high = (np.uint64(bound) for bound in prefix_range(text))
    prefixes = rows.key_prefixes
    candidates = np.flatnonzero(prefixes == low if low == high else (prefixes >= low) & (prefixes <= high))
    return [place for place in candidates.tolist() if _text(rows, "key", place).startswith(text)]


def _numbers(rows: Rows, places: list[int]) -> list[int]:
    """The sample numbers of those of some rows that were not skipped."""
    numbers = np.searchsorted(rows.samples, places).tolist()
    n = len(rows.samples)
    return [i for i, place in zip(numbers, places, strict=True) if i < n and rows.samples[i] == place]


def _text(rows: Rows, name: str, place: int) -> str:
    return str(rows[name][place].as_py())


def _key(rows: Rows, number: int) -> str:
    return _text(rows, "key", int(rows.samples[number]))


def _ambiguous(rows: Rows, numbers: list[int], what: str) -> NoReturn:
    keys = [_key(rows, number) for number in numbers[:_SHOWN]]
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    raise UsageError(f"{what}; name one by its key: {', '.join(keys)}{more}")


def _not_found(rows: Rows, skipped: list[int], key_or_id: str, where: str) -> NoReturn:
    if skipped:
        row, name, reason, detail = (rows[name][skipped[0]].as_py() for name in ("row", "id", "reason", "detail"))
        raise SampleNotFoundError(f"{where}: row {row} (id {name!r}) was skipped: {reason}: {detail}")
    raise SampleNotFoundError(
        f"{where}: no sample has the key or id {key_or_id!r}, nor a key that begins so (give at least "
        f"{MIN_PREFIX} characters)"
    )
