"""What it costs to read rows of one Parquet row group with more than 2 GB of pictures, in memory and in time.

    python -m benchmarks.storage.large_row_group --gigabytes 2.2

The file is what pyarrow's default writer makes of such a table: one row group, snappy. Its pictures are random bytes of
PICTURE_BYTES, so that nothing compresses. Each way of reading is a process of its own:

    whole     pyarrow reads the row group at once, as emkd did before 0.3: the error is the figure
    in order  every row once, as a job makes a cache
    texts     the conversations alone, as training finds its rows
    training  N_TRAINED rows in the order of training, shards of 256 rows and the default window
    jumps     N_JUMPS single rows at random, the worst case

Needs as much free disk as the file takes and as much memory to write it. Deletes the file. Writes
benchmarks/results/large_row_group.json.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common.measuring import MIB, in_process, peak, reset_peak
from benchmarks.common.provenance import RESULTS, provenance, write_results
from emkd.samples import Dataset
from emkd.samples.sources.parquet import KEPT_BYTES, PIECE_BYTES
from emkd.trainer.data.order import epoch_order
from emkd.trainer.recipe.recipe import Recipe

PICTURE_BYTES = 220_000
ROWS_PER_SHARD = 256
N_TRAINED = 2048
N_JUMPS = 8
WAYS = ("write", "whole", "in order", "texts", "training", "jumps")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)


def write(path: Path, n_rows: int) -> None:
    """Write a table as pyarrow does by default: all of it in one row group."""
    rng, batches = random.Random(0), []
    for start in range(0, n_rows, 100):
        rows = [
            {
                "id": str(row),
                "images": [{"bytes": rng.randbytes(PICTURE_BYTES), "path": None}],
                "messages": [
                    {"role": "user", "content": f"<image>\nwhat is in picture {row}"},
                    {"role": "assistant", "content": f"number {row}"},
                ],
            }
            for row in range(start, min(start + 100, n_rows))
        ]
        batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
    pq.write_table(pa.Table.from_batches(batches), path)
    assert pq.ParquetFile(path).num_row_groups == 1


def read_whole(path: Path) -> dict[str, Any]:
    try:
        pq.ParquetFile(path).read_row_group(0)
    except (pa.ArrowException, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def read_rows(dataset: Dataset, rows: list[int]) -> dict[str, Any]:
    for row in rows:
        found = dataset.row(row)
        assert found.id == str(row)
        assert len(found.images[0]["bytes"]) == PICTURE_BYTES
    return {"rows": len(rows)}


def read_texts(dataset: Dataset) -> dict[str, Any]:
    return {"rows": len(set(dataset.text_hashes()))}


def trained(n_rows: int) -> list[int]:
    sizes = [min(ROWS_PER_SHARD, n_rows - start) for start in range(0, n_rows, ROWS_PER_SHARD)]
    order: list[int] = epoch_order(sizes, Recipe().window, 0, 0).tolist()
    return order[:N_TRAINED]


def measure(way: str, path: Path) -> dict[str, Any]:
    """Time and peak memory of one way to read, in this process."""
    n_rows = pq.ParquetFile(path).metadata.num_rows
    before = reset_peak()
    started = time.perf_counter()
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "whole": lambda: read_whole(path),
        "in order": lambda: read_rows(Dataset(str(path)), list(range(n_rows))),
        "texts": lambda: read_texts(Dataset(str(path))),
        "training": lambda: read_rows(Dataset(str(path)), trained(n_rows)),
        "jumps": lambda: read_rows(Dataset(str(path)), random.Random(1).sample(range(n_rows), N_JUMPS)),
    }
    found = calls[way]()
    return {**found, "seconds": round(time.perf_counter() - started, 2), "peak_mib": round((peak() - before) / MIB)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        writes = arguments.way == "write"
        print(json.dumps(write(arguments.path, arguments.rows) if writes else measure(arguments.way, arguments.path)))
        return
    origin = provenance()
    n_rows = round(arguments.gigabytes * 1e9 / PICTURE_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        in_process("benchmarks.storage.large_row_group", "--way", "write", "--path", path, "--rows", n_rows)
        n_bytes = path.stat().st_size
        found = {}
        for way in WAYS[1:]:
            found[way] = in_process("benchmarks.storage.large_row_group", "--way", way, "--path", path)
            print(way, found[way])
    limits = {"piece_mib": PIECE_BYTES // MIB, "kept_mib": KEPT_BYTES // MIB}
    content = {**origin, "pyarrow": pa.__version__, "rows": n_rows, "file_bytes": n_bytes, **limits, "ways": found}
    write_results(RESULTS / "large_row_group.json", content)


if __name__ == "__main__":
    main()
