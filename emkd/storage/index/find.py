"""Find a sample by its key, its id, or the beginning of its key."""

from typing import NoReturn

import numpy as np
import pyarrow.compute as pc

from emkd.errors import SampleNotFoundError, UsageError
from emkd.storage.index.columns import Rows, as_numpy, prefix_range, text_scalar

MIN_PREFIX = 6
_SHOWN = 10


def find_sample(rows: Rows, key_or_id: str, where: str) -> int:
    """Return the number of the sample with this key, id, or unique beginning of a key.

    Rows with the same key have the same content, so the first of them is returned. Raises UsageError, which lists the
    keys, if several samples have the id or several keys start with the text, and SampleNotFoundError if there is no
    such sample, with the reason if the row was skipped.
    """
    with_beginning = _with_beginning(rows, key_or_id)
    with_key = [position for position in with_beginning if _text(rows, "key", position) == key_or_id]
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
        numbers = _numbers(rows, with_beginning)
        if len({_key(rows, number) for number in numbers}) > 1:
            _ambiguous(rows, numbers, f"{where}: {len(numbers)} keys start with {key_or_id!r}")
        if numbers:
            return numbers[0]
    _not_found(rows, sorted({*with_key, *with_id}), key_or_id, where)


def _with_beginning(rows: Rows, text: str) -> list[int]:
    """Return the positions in `rows` of keys that start with `text`, ascending; none if it is empty.

    Only the few keys with the same first bytes are compared whole.
    """
    if not text:
        return []
    low, high = (np.uint64(bound) for bound in prefix_range(text))
    prefixes = rows.key_prefixes
    candidates = np.flatnonzero(prefixes == low if low == high else (prefixes >= low) & (prefixes <= high))
    return [position for position in candidates.tolist() if _text(rows, "key", position).startswith(text)]


def _numbers(rows: Rows, positions: list[int]) -> list[int]:
    """Return the sample numbers of the rows at `positions`, without skipped rows."""
    candidates = np.searchsorted(rows.samples, positions).tolist()
    n = len(rows.samples)
    return [
        number
        for number, position in zip(candidates, positions, strict=True)
        if number < n and rows.samples[number] == position
    ]


def _text(rows: Rows, name: str, position: int) -> str:
    return str(rows[name][position].as_py())


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
        f"{where}: no sample has the key or id {key_or_id!r}, and no key starts with it (give at least {MIN_PREFIX} "
        "characters)"
    )
