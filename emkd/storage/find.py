"""From what a user types to a sample: a key, an id, or the beginning of a key."""

from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from emkd.errors import SampleNotFoundError, UsageError

MIN_PREFIX = 6
_SHOWN = 10


def find_sample(samples: pa.Table, skipped: pa.Table, key_or_id: str, where: str) -> int:
    """Number of the sample in `samples` (columns key, id) with this key, id, or unique beginning of a key.

    A key that several rows have names the same content, so the first of them is the answer; an id that
    several rows have is a UsageError that lists their keys, as is a beginning of several keys.
    SampleNotFoundError where there is none, with the reason if it is among the `skipped`.
    """
    same_key = _numbers(pc.equal(samples["key"], key_or_id))
    if same_key:
        return same_key[0]
    same_id = _numbers(pc.equal(samples["id"], key_or_id)) if key_or_id else []
    if len(same_id) > 1:
        _ambiguous(samples, same_id, f"{where}: {len(same_id)} samples have the id {key_or_id!r}")
    if same_id:
        return same_id[0]
    if len(key_or_id) >= MIN_PREFIX:
        begins = _numbers(pc.starts_with(samples["key"], key_or_id))
        if len({samples["key"][i].as_py() for i in begins}) > 1:
            _ambiguous(samples, begins, f"{where}: {len(begins)} keys begin with {key_or_id!r}")
        if begins:
            return begins[0]
    _not_found(skipped, key_or_id, where)


def _numbers(mask: pa.ChunkedArray) -> list[int]:
    return pc.indices_nonzero(mask).to_pylist()


def _ambiguous(samples: pa.Table, numbers: list[int], what: str) -> NoReturn:
    keys = [samples["key"][i].as_py() for i in numbers[:_SHOWN]]
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    raise UsageError(f"{what}; name one by its key: {', '.join(keys)}{more}")


def _not_found(skipped: pa.Table, key_or_id: str, where: str) -> NoReturn:
    mask = pc.or_(pc.equal(skipped["key"], key_or_id), pc.equal(skipped["id"], key_or_id))
    rows = skipped.filter(mask).to_pylist() if key_or_id else []
    if rows:
        raise SampleNotFoundError(
            f"{where}: row {rows[0]['row']} (id {rows[0]['id']!r}) was skipped: {rows[0]['reason']}: "
            f"{rows[0]['detail']}"
        )
    raise SampleNotFoundError(
        f"{where}: no sample has the key or id {key_or_id!r}, nor a key that begins so (give at least "
        f"{MIN_PREFIX} characters)"
    )
