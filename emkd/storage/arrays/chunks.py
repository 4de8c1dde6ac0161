"""Encode chunks as bytes and decode them, with the codecs of the Zarr v3 core, called directly.

Any Zarr reader opens the result: `metadata` returns what zarr-python writes for an array. emkd calls the codecs itself
so that it decodes exactly the bytes that it checked, and to save zarr-python's overhead
(`benchmarks/storage/reading.py` compares with zarrs).
"""

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import numcodecs
import numcodecs.blosc
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from emkd.errors import DamagedCacheError
from emkd.storage.arrays.layout import ArrayLayout
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.sizes import unpack_blosc, unpack_zstd

# Blosc's threads suit a process that has the machine to itself; here workers share the cores, and some are forked.
numcodecs.blosc.use_threads = False

_LEVELS = {"zstd": 1, "lz4": 5}  # a higher level of zstd saves few bytes and takes several times as long
# Blosc's default blocks are smaller and compress less. Blocks larger than these save lz4 few bytes; these fit into a
# core's cache while they are unshuffled.
_BLOCK_BYTES = {"zstd": 2**20, "lz4": 2**17}
_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


def encode_chunk(layout: ArrayLayout, values: NDArray[Any]) -> bytes:
    """Return the bytes of a whole chunk on disk. values: of the shape of a chunk, `layout.shape(tokens of a chunk)`"""
    name = layout.compression
    codec = numcodecs.Blosc(name, _LEVELS[name], _SHUFFLES[layout.shuffle], blocksize=_BLOCK_BYTES[name])
    return bytes(codec.encode(np.ascontiguousarray(values)))


def metadata(layout: ArrayLayout, length: int, tokens_per_chunk: int) -> bytes:
    """Return zarr.json of an array with `length` elements along its axis, as zarr-python writes it."""
    stored: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(stored),
        shape=layout.shape(length),
        dtype=layout.dtype,
        chunks=layout.shape(max(1, tokens_per_chunk)),
        compressors=_compressors(layout),
        filters=None,
        fill_value=0,
        attributes=layout.attributes,
        dimension_names=layout.dimension_names,
        zarr_format=3,
    )
    return stored["zarr.json"].to_bytes()


def _compressors(layout: ArrayLayout) -> list[BloscCodec]:
    return [
        BloscCodec(
            typesize=layout.dtype.itemsize,
            cname=layout.compression,
            clevel=_LEVELS[layout.compression],
            shuffle=layout.shuffle,
            blocksize=_BLOCK_BYTES[layout.compression],
        )
    ]


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Return zarr.json of a group, as zarr-python writes it."""
    stored: dict[str, Buffer] = {}
    zarr.create_group(store=MemoryStore(stored), zarr_format=3, attributes=attributes)
    return stored["zarr.json"].to_bytes()


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """An array on disk, as its zarr.json describes it. chunk: shape of a chunk;  codec: "blosc", "zstd" or "none" """

    layout: ArrayLayout
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    codec: str

    @classmethod
    def of(cls, where: str, data: bytes, layout: ArrayLayout, length: int | None) -> "StoredArray":
        """Parse `data`, the zarr.json at `where`.

        layout, length: what the manifest and the index say of the array; a length of None is not compared

        Raises DamagedCacheError if zarr.json describes another array or codecs that this module does not decode.
        """
        try:
            found = json.loads(data)
            shape, chunk = (
                _whole_numbers(found["shape"]),
                _whole_numbers(found["chunk_grid"]["configuration"]["chunk_shape"]),
            )
            codecs = [codec["name"] for codec in found["codecs"]]
            length = shape[layout.token_axis] if length is None else length
            described = (shape, found["data_type"], found["attributes"].get("precision"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCacheError(f"{where}: not the metadata of an array ({error!r}). {NEXT_STEP}") from error
        expected = (layout.shape(length), layout.dtype.name, layout.attributes.get("precision"))
        if described != expected:
            raise DamagedCacheError(
                f"{where}: shape, type and precision are {described}, expected {expected} from the manifest and the "
                f"index. {NEXT_STEP}"
            )
        if not any(
            chunk == layout.shape(tokens) for tokens in chunk[layout.token_axis :][:1] if 1 <= tokens <= max(1, length)
        ):
            raise DamagedCacheError(
                f"{where}: chunks of shape {chunk} of an array of shape {shape}; expected whole tokens, at most all of "
                f"them. {NEXT_STEP}"
            )
        expected_codecs = [["blosc"], *([[]] if layout.once_plain else [["zstd"]])]
        if codecs[:1] != ["bytes"] or codecs[1:] not in expected_codecs:
            names = " or ".join(some[0] if some else "none" for some in expected_codecs)
            raise DamagedCacheError(f"{where}: codecs {codecs}, expected bytes and then {names}. {NEXT_STEP}")
        return cls(layout=layout, shape=shape, chunk=chunk, codec=codecs[1] if len(codecs) > 1 else "none")

    @property
    def tokens_per_chunk(self) -> int:
        """Elements of a chunk along the array's axis."""
        return self.chunk[self.layout.token_axis]

    @property
    def n_chunks(self) -> int:
        """The number of chunks."""
        return -(-self.shape[self.layout.token_axis] // self.tokens_per_chunk)

    @property
    def n_bytes(self) -> int:
        """Memory of all chunks in bytes."""
        return self.n_chunks * prod(self.chunk) * self.layout.dtype.itemsize

    def chunk_names(self) -> list[str]:
        """Return the names of the chunks in the array's folder, in the order of the tokens."""
        return [chunk_name(self.layout, i) for i in range(self.n_chunks)]

    def decode(self, where: str, data: bytes, chunk: NDArray[Any]) -> None:
        """Decode `data` into `chunk`, which has the shape and type of a chunk.

        Raises DamagedCacheError if the bytes are not a whole chunk.
        """
        try:
            if self.codec == "blosc":
                unpack_blosc(data, chunk.reshape(-1).view(np.uint8).data)
            else:
                plain = data if self.codec == "none" else unpack_zstd(data, chunk.nbytes)
                chunk[...] = np.frombuffer(plain, self.layout.dtype).reshape(self.chunk)
        except (ValueError, RuntimeError) as error:
            raise DamagedCacheError(f"{where}: not a chunk of shape {self.chunk} ({error}). {NEXT_STEP}") from error


def _whole_numbers(found: Any) -> tuple[int, ...]:
    """Return a list of JSON as numbers. Raises TypeError for floats, which equal whole numbers, and for booleans."""
    if not isinstance(found, list) or any(type(number) is not int for number in found):
        raise TypeError(f"{found!r:.80} are not whole numbers")
    return tuple(found)


def chunk_name(layout: ArrayLayout, index: int) -> str:
    """Return the name of a chunk in its array's folder. index: of the chunk, along the tokens"""
    if layout.width is None:
        return f"c/{index}"
    return f"c/0/{index}" if layout.by_rank else f"c/{index}/0"
