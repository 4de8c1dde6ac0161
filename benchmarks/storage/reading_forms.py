"""The same samples in the forms that reading.py compares.

    raw/<shard>/<field>.bin, offsets.npz     uncompressed numbers, sample after sample
    emkd-zstd/ emkd-lz4/                     caches
    mds-same-<codec>/<shard>/                MDS, the arrays of the cache with the same codec, sample by sample
    mds-<codec>/<shard>/                     MDS, each field of a sample compressed separately (`packed`)
    mds-whole/<shard>/                       MDS, raw fields; MDS compresses the shard's file (zstd)
    zarr-small/<shard>/                      Zarr arrays with chunks for per-sample reading: 1,024 tokens

All forms but the caches and mds-same hold int32 ids, bfloat16 logits as uint16, float32 tails and int8 affinity. They
are made from `raw`, so that their numbers are equal. Their codecs are Blosc with bitshuffle for ids and logits, and
plain Blosc for affinity, in blocks of 1 MiB, which read faster than the blocks that Blosc would choose.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emkd.storage.precision import decode_affinity, decode_logits, encode_affinity, encode_logits

Arrays = dict[str, NDArray[Any]]

# field -> (what its first axis counts, type, whether each entry has k numbers)
FIELDS: dict[str, tuple[str, Any, bool]] = {
    "text_ids": ("text", np.int32, False),
    "vision_ids": ("vision", np.int32, True),
    "vision_logits": ("vision", np.uint16, True),
    "vision_tail_logsumexp": ("vision", np.float32, False),
    "vision_tail_mean": ("vision", np.float32, False),
    "affinity": ("pairs", np.int8, False),
    "answer_positions": ("answer", np.int32, False),
    "answer_ids": ("answer", np.int32, True),
    "answer_logits": ("answer", np.uint16, True),
    "answer_tail_logsumexp": ("answer", np.float32, False),
}
LEVELS = {"zstd": 3, "lz4": 5}
SMALL_CHUNK = 1024


def flat(sample: Any) -> Arrays:
    """Return the arrays of a Record, or of a dictionary of its fields, under the names of FIELDS."""
    fields = sample if isinstance(sample, dict) else vars(sample)
    if "vision" not in fields:
        return fields
    tops = {
        f"{kind}_{field.name}": getattr(fields[kind], field.name)
        for kind in ("vision", "answer")
        for field in dataclasses.fields(fields[kind])
    }
    return {name: tops[name] if name in tops else fields[name] for name in FIELDS}


def stored(record: Any) -> Arrays:
    """Return what all forms but the caches store of a Record."""
    found = flat(record)
    for kind in ("vision", "answer"):
        found[f"{kind}_logits"] = encode_logits(found[f"{kind}_logits"], "bfloat16")
    return found | {"affinity": encode_affinity(found["affinity"], "int8").reshape(-1)}


def decoded(arrays: Arrays, own: bool = False) -> Arrays:
    """Return the fields of a Record from the arrays of `stored`, which may be flattened.

    own: the memory belongs to this sample alone, so that nothing is copied
    """
    k = arrays["vision_ids"].size // len(arrays["vision_tail_mean"])
    found = {name: array.reshape(-1, k) if FIELDS[name][2] else array for name, array in arrays.items()}
    for name, array in found.items():
        if name.endswith("_logits"):
            found[name] = decode_logits(array, "bfloat16")
        elif name == "affinity":
            found[name] = decode_affinity(array, "int8").reshape(len(found["text_ids"]), -1)
        else:
            found[name] = array if own else array.copy()
    return found


def offsets(folder: Path) -> Arrays:
    """Return by axis the offset of each sample of a raw shard, and the end of the last one."""
    with np.load(folder / "offsets.npz") as found:
        return dict(found)


def raw_sample(folder: Path, ends: Arrays, k: int, i: int) -> Arrays:
    """Return sample i of a raw shard as memory-mapped views."""
    found = {}
    for name, (axis, dtype, wide) in FIELDS.items():
        whole = np.memmap(folder / f"{name}.bin", dtype, mode="r")
        whole = whole.reshape(-1, k) if wide else whole
        found[name] = whole[ends[axis][i] : ends[axis][i + 1]]
    return found


def write_raw(folder: Path, records: Iterator[Any]) -> None:
    """Write one shard in the form `raw`."""
    folder.mkdir(parents=True)
    counts: dict[str, list[int]] = {axis: [0] for axis, _, _ in FIELDS.values()}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in FIELDS}
        for record in records:
            arrays = stored(record)
            for name, array in arrays.items():
                files[name].write(np.ascontiguousarray(array).data)
            sizes = {FIELDS[name][0]: len(array) for name, array in arrays.items()}
            for axis, size in sizes.items():
                counts[axis].append(counts[axis][-1] + size)
    np.savez(folder / "offsets.npz", **{axis: np.array(ends) for axis, ends in counts.items()})  # type: ignore[arg-type]


def packed(name: str, array: NDArray[Any], codec: str) -> bytes:
    """Return a field of a sample, compressed for MDS."""
    import numcodecs

    numcodecs.blosc.use_threads = False
    shuffle = numcodecs.Blosc.NOSHUFFLE if name == "affinity" else numcodecs.Blosc.BITSHUFFLE
    blosc = numcodecs.Blosc(codec, LEVELS[codec], shuffle, blocksize=2**20)
    return bytes(blosc.encode(np.ascontiguousarray(array)))


def write_mds(folder: Path, raw: Path, k: int, codec: str) -> None:
    """Write one shard as MDS.

    codec: of the fields, or "whole": raw fields, and MDS compresses the file
    """
    from streaming import MDSWriter

    ends = offsets(raw)
    compression = "zstd:3" if codec == "whole" else None
    columns = dict.fromkeys(FIELDS, "bytes")
    with MDSWriter(out=str(folder), columns=columns, compression=compression, size_limit=None) as writer:
        for i in range(len(ends["text"]) - 1):
            sample = raw_sample(raw, ends, k, i)
            whole = codec == "whole"
            writer.write({n: a.tobytes() if whole else packed(n, a, codec) for n, a in sample.items()})


def write_mds_same(folder: Path, cache: Path, number: int) -> None:
    """Write one shard of a cache as MDS. Only the container differs."""
    from streaming import MDSWriter

    from emkd.storage import Cache
    from emkd.storage.arrays.chunks import encode_chunk

    opened = Cache.open(cache)
    shard = opened.read_shard(opened.shards[number])
    columns = dict.fromkeys(shard.arrays, "bytes")
    with MDSWriter(out=str(folder), columns=columns, size_limit=None) as writer:
        for i in range(len(shard)):
            stored = shard.stored(i)
            writer.write({name: encode_chunk(shard.arrays[name].layout, array) for name, array in stored.items()})


def write_small_chunks(folder: Path, raw: Path, k: int) -> None:
    """Write one shard as Zarr arrays of chunks of SMALL_CHUNK tokens; slices of them read faster than of 16,384."""
    import zarr
    from zarr.codecs import BloscCodec

    group = zarr.create_group(folder)
    n_text = int(offsets(raw)["text"][1])
    for name, (axis, dtype, wide) in FIELDS.items():
        flat = np.fromfile(raw / f"{name}.bin", dtype)
        array = flat.reshape(-1, k) if wide else flat
        size = SMALL_CHUNK * n_text if axis == "pairs" else SMALL_CHUNK
        codec = BloscCodec(
            typesize=array.itemsize, cname="zstd", clevel=3, shuffle="noshuffle" if axis == "pairs" else "bitshuffle"
        )
        chunks = (min(size, len(array)), *array.shape[1:])
        created = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks, compressors=[codec])
        created[...] = array


def main() -> None:
    """Write the MDS shards. Runs in the environment that has the library."""
    parser = argparse.ArgumentParser(description="MDS shards from raw ones")
    parser.add_argument("work", type=Path)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--codecs", nargs="+", required=True)
    arguments = parser.parse_args()
    for codec in arguments.codecs:
        for number, raw in enumerate(sorted((arguments.work / "raw").iterdir())):
            if codec.startswith("same-"):
                cache = arguments.work / f"emkd-{codec.removeprefix('same-')}"
                write_mds_same(arguments.work / f"mds-{codec}" / raw.name, cache, number)
                continue
            write_mds(arguments.work / f"mds-{codec}" / raw.name, raw, arguments.k, codec)


if __name__ == "__main__":
    main()
