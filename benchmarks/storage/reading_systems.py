"""The readers that reading.py compares, and the process that runs one of them.

A reader opens a folder that reading_forms.py describes; `read(shard, i)` returns the i-th sample of a shard as the
fields of a Record: float32 logits and affinity, in memory of the sample alone. reading.py runs

    python -m benchmarks.storage.reading_systems WORK --system NAME --order order.npy

which opens the folder, reads the samples once, prints "ready", waits for a line, reads the samples again in that order,
and prints what that took as JSON.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.common.measuring import MIB, page_faults, peak, reset_peak, timed
from benchmarks.storage.reading_forms import FIELDS, decoded, flat, offsets

N_COMPARED = 8  # samples whose numbers are hashed


class Reader(Protocol):
    """Described in the module."""

    def read(self, shard: int, i: int) -> Any: ...


class Emkd:
    """The cache through Cache.record, which compares every object with its hash."""

    def __init__(self, folder: Path, window: int) -> None:
        from emkd.storage import Cache

        self.cache = Cache.open(folder, window=window)
        self.first = [self.cache.samples_of_shard(shard).start for shard in self.cache.shards]

    def read(self, shard: int, i: int) -> Any:
        return self.cache.record(self.first[shard] + i)


class EmkdThroughZarrs(Emkd):
    """The same with chunks decoded by zarrs: all objects of an array are read and compared, then zarrs reads them."""

    def __init__(self, folder: Path, window: int) -> None:
        import zarr

        import emkd.storage.shards.reader

        super().__init__(folder, window)
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})

        def read_array(objects: Any, layout: Any, length: int, buffers: Any) -> Any:
            for name in objects.objects:
                if name.startswith(f"{layout.name}/"):
                    objects.read(name)
            array: Any = buffers.empty((1, *layout.shape(length)), layout.dtype)
            array[0] = zarr.open_array(objects.where(layout.name), mode="r")[...]
            return emkd.storage.shards.reader.ChunkedArray(layout=layout, chunks=array)

        emkd.storage.shards.reader._read_array = read_array


class EmkdSlices:
    """The arrays of the cache's shards through zarr-python, a slice for each sample; nothing is checked."""

    def __init__(self, folder: Path, window: int) -> None:
        import zarr

        from emkd.storage import Cache
        from emkd.storage.arrays.record_arrays import RecordArrays

        cache = Cache.open(folder)
        self.record_arrays, self.rows, self.groups = RecordArrays.of(cache.manifest), [], []
        for shard in cache.shards:
            decoded_shard = cache.read_shard(shard)
            self.rows.append(decoded_shard.samples)
            self.layouts = [array.layout for array in decoded_shard.arrays.values()]
            (path,) = (folder / "shards").glob(f"{shard:06d}-*")
            group = zarr.open_group(path, mode="r")
            self.groups.append({layout.name: group[layout.name] for layout in self.layouts})

    def read(self, shard: int, i: int) -> Any:
        row, found = self.rows[shard][i], {}
        for layout in self.layouts:
            first = row[f"{layout.axis}_offset"]
            part = slice(first, first + row[f"{layout.axis}_count"])
            array: Any = self.groups[shard][layout.name]
            found[layout.name] = array[:, part] if layout.by_rank else array[part]
        return self.record_arrays.decode(found)


class RawMemmap:
    """np.memmap of uncompressed numbers; slices are copied."""

    def __init__(self, folder: Path, window: int) -> None:
        self.shards = sorted(folder.iterdir())
        self.ends = [offsets(shard) for shard in self.shards]
        k = json.loads((folder.parent / "about.json").read_text())["k"]
        self.arrays = [{name: _memmap(shard, name, k) for name in FIELDS} for shard in self.shards]

    def read(self, shard: int, i: int) -> Any:
        ends = self.ends[shard]
        return decoded(
            {name: a[ends[FIELDS[name][0]][i] : ends[FIELDS[name][0]][i + 1]] for name, a in self.arrays[shard].items()}
        )


class ZarrSmall(RawMemmap):
    """Zarr arrays with small chunks, a slice for each sample."""

    def __init__(self, folder: Path, window: int) -> None:
        import zarr

        self.ends = [offsets(shard) for shard in sorted((folder.parent / "raw").iterdir())]
        groups = [zarr.open_group(shard, mode="r") for shard in sorted(folder.iterdir())]
        self.arrays: Any = [{name: group[name] for name in FIELDS} for group in groups]


class Mds:
    """MDS through streaming's LocalDataset.get_item, one dataset for each shard, so that the order is the same.

    Its StreamingDataset reads samples with the same MDSReader, and adds shared memory and its own order.
    """

    def __init__(self, folder: Path, window: int) -> None:
        import numcodecs.blosc
        from streaming import LocalDataset

        numcodecs.blosc.use_threads = False
        self.decompress = numcodecs.blosc.decompress
        self.shards = [LocalDataset(str(shard)) for shard in sorted(folder.iterdir())]

    def read(self, shard: int, i: int) -> Any:
        sample = self.shards[shard].get_item(i)
        return decoded(
            {name: np.frombuffer(self.decompress(sample[name]), FIELDS[name][1]) for name in FIELDS}, own=True
        )


class MdsSame:
    """The same reader for the arrays of the cache, with their codec."""

    def __init__(self, folder: Path, window: int) -> None:
        import numcodecs.blosc
        from streaming import LocalDataset

        from emkd.storage import Cache
        from emkd.storage.arrays.record_arrays import RecordArrays

        numcodecs.blosc.use_threads = False
        self.decompress = numcodecs.blosc.decompress
        self.shards = [LocalDataset(str(shard)) for shard in sorted(folder.iterdir())]
        manifest = Cache.open(folder.parent / folder.name.replace("mds-same", "emkd")).manifest
        self.record_arrays = RecordArrays.of(manifest)
        self.layouts = self.record_arrays.layouts

    def read(self, shard: int, i: int) -> Any:
        sample, found = self.shards[shard].get_item(i), {}
        for layout in self.layouts:
            flat = np.frombuffer(self.decompress(sample[layout.name]), layout.dtype)
            found[layout.name] = flat.reshape(layout.shape(-1))
        return self.record_arrays.decode(found)


class MdsWhole:
    """MDS whose shards MDS itself compresses.

    Like streaming, this decompresses a shard's file to the disk at its first use and reads samples from there;
    `window` files are kept.
    """

    def __init__(self, folder: Path, window: int) -> None:
        from streaming import LocalDataset

        self.folders, self.window = sorted(folder.iterdir()), window
        self.scratch = folder.parent / f"scratch-{time.monotonic_ns()}"
        self.open_dataset = LocalDataset
        self.open: OrderedDict[int, Any] = OrderedDict()

    def read(self, shard: int, i: int) -> Any:
        if shard not in self.open:
            while len(self.open) >= self.window:
                shutil.rmtree(self.scratch / str(self.open.popitem(last=False)[0]))
            self.open[shard] = self._decompressed(shard)
        sample = self.open[shard].get_item(i)
        return decoded({name: np.frombuffer(sample[name], FIELDS[name][1]) for name in FIELDS}, own=True)

    def _decompressed(self, shard: int) -> Any:
        from streaming.base.compression import decompress

        source, target = self.folders[shard], self.scratch / str(shard)
        target.mkdir(parents=True)
        shutil.copy(source / "index.json", target)
        (info,) = json.loads((source / "index.json").read_text())["shards"]
        data = decompress(info["compression"], (source / info["zip_data"]["basename"]).read_bytes())
        (target / info["raw_data"]["basename"]).write_bytes(data)
        return self.open_dataset(str(target))

    def close(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)


# name -> (folder, reader)
SYSTEMS: dict[str, tuple[str, Callable[[Path, int], Reader]]] = {
    "emkd-zstd": ("emkd-zstd", Emkd),
    "emkd-lz4": ("emkd-lz4", Emkd),
    "raw-memmap": ("raw", RawMemmap),
    "mds-same-zstd": ("mds-same-zstd", MdsSame),
    "mds-same-lz4": ("mds-same-lz4", MdsSame),
    "mds-zstd": ("mds-zstd", Mds),
    "mds-lz4": ("mds-lz4", Mds),
    "mds-whole-zstd": ("mds-whole", MdsWhole),
    "zarr-slices": ("emkd-zstd", EmkdSlices),
    "zarr-slices-small-chunks": ("zarr-small", ZarrSmall),
    "emkd-zstd-zarrs": ("emkd-zstd", EmkdThroughZarrs),
    "emkd-lz4-zarrs": ("emkd-lz4", EmkdThroughZarrs),
}
FOREIGN = (
    "mds-same-zstd",
    "mds-same-lz4",
    "mds-zstd",
    "mds-lz4",
    "mds-whole-zstd",
    "emkd-zstd-zarrs",
    "emkd-lz4-zarrs",
)


def digest(samples: list[Any]) -> str:
    """Return a hash of the samples' numbers, independent of their order in memory."""
    hashed = hashlib.sha256()
    for sample in samples:
        arrays = flat(sample)
        for name in FIELDS:
            array = np.ascontiguousarray(arrays[name])
            hashed.update(f"{name} {array.shape} {array.dtype}".encode())
            hashed.update(array.data)
    return hashed.hexdigest()


def run(work: Path, system: str, order: Path, window: int) -> dict[str, Any]:
    """Read once, wait for a line on standard input, read again, and return what that took.

    The first epoch is not timed, because in it the process gets fresh memory from the system, once in a run.
    """
    folder, reader_of = SYSTEMS[system]
    numbers = [(int(shard), int(i)) for shard, i in np.load(order)]
    reader = reader_of(work / folder, window)
    before = reset_peak()
    read_all(reader, numbers)
    print("ready", flush=True)
    sys.stdin.readline()
    faults_before = page_faults()
    took = timed(lambda: read_all(reader, numbers))
    took |= {"peak_mib": (peak() - before) / MIB, "page_faults": page_faults() - faults_before}
    compared = digest([reader.read(*number) for number in numbers[-N_COMPARED:]])
    if isinstance(reader, MdsWhole):
        reader.close()
    return {"samples": len(numbers), **took, "digest": compared}


def read_all(reader: Reader, numbers: list[tuple[int, int]]) -> None:
    for shard, i in numbers:
        reader.read(shard, i)


def _memmap(folder: Path, name: str, k: int) -> Any:
    _, dtype, wide = FIELDS[name]
    whole = np.memmap(folder / f"{name}.bin", dtype, mode="r")
    return whole.reshape(-1, k) if wide else whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--system", choices=list(SYSTEMS), required=True)
    parser.add_argument("--order", type=Path, required=True)
    parser.add_argument("--window", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.work, arguments.system, arguments.order, arguments.window)))


if __name__ == "__main__":
    main()
