"""Sizes that files state, read and checked before memory is taken for them.

A cache may come from a stranger, whose hashes fit to whatever the files say: a hash tells damage from what was written,
and says nothing of who wrote it. So no number in a header, an index, a manifest or a zarr.json decides alone how much
memory is taken. What a file decodes to is compared with what its reader expects, and everything together with what the
bytes on disk can explain:

    memory <= ALWAYS + MOST_TIMES * bytes on disk

Real shards decode to less than 20 times their bytes; only constant numbers compress better, and of those ALWAYS is
enough for the small caches of tests.
"""

import numcodecs.blosc
import zstandard

from emkd.errors import DamagedCacheError
from emkd.storage.objects.digest import NEXT_STEP

ALWAYS = 2**28
MOST_TIMES = 200
# Of blosc, before its blocks; and what a codec may add to numbers that it cannot compress, for each of its blocks.
_BLOSC_HEADER = 16

LARGEST = 2**53  # of any count; JSON readers of other languages have no larger whole numbers
MOST_SHARDS = 2**20
MOST_IDS = 2**24  # ids are stored in 24 bits
MOST_COLUMNS = 2**16  # of codes


def check_explained(where: str, n_bytes: int, on_disk: int) -> None:
    """Raise DamagedCacheError if something that takes `on_disk` bytes says that it takes `n_bytes` in memory."""
    if n_bytes > ALWAYS + MOST_TIMES * on_disk:
        raise DamagedCacheError(
            f"{where}: would take {n_bytes:,} bytes of memory, and the {on_disk:,} bytes on disk explain at most "
            f"{ALWAYS + MOST_TIMES * on_disk:,}. {NEXT_STEP}"
        )


def blosc_size(data: bytes) -> int:
    """Return the decoded size that the header of a Blosc chunk states.

    Raises ValueError if the header is not that of these bytes: Blosc itself would read beyond their end.
    """
    if len(data) < _BLOSC_HEADER:
        raise ValueError(f"{len(data)} bytes are fewer than a header of Blosc")
    decoded, encoded = (int.from_bytes(data[at : at + 4], "little") for at in (4, 12))
    if encoded != len(data):
        raise ValueError(f"its header says {encoded} bytes, it has {len(data)}")
    return decoded


def unpack_blosc(data: bytes, out: memoryview) -> None:
    """Decode a Blosc chunk into `out`. Raises ValueError, before anything is decoded, if it is of another size."""
    said = blosc_size(data)
    if said != out.nbytes:
        raise ValueError(f"{said} bytes, expected {out.nbytes}")
    numcodecs.blosc.decompress(data, out)


def unpack_zstd(
    data: bytes | memoryview, n_bytes: int, decompressor: zstandard.ZstdDecompressor | None = None
) -> bytes:
    """Return the content of one zstd frame. Raises ValueError, before memory is taken, if it does not say `n_bytes`."""
    try:
        said = zstandard.frame_content_size(data)
        if said != n_bytes:
            raise ValueError(f"{said} bytes, expected {n_bytes}")
        content: bytes = (decompressor or zstandard.ZstdDecompressor()).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return content
