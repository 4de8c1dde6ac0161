"""How long a training run takes to find its data in a cache: 100,000 rows, from the files to the selected samples.

    python -m benchmarks.storage.training_start --rows 100000 --runs 3

The storage's own writer makes a sealed cache in a temporary folder, without a teacher. The dataset exists as JSON in
LLaVA's style without its image files (nothing may open one), as Parquet with images, and as half of the rows of each,
shuffled. The parts of each start are timed, the starts in turn, with a warm page cache. Writes
benchmarks/results/start_time.json.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common.manifests import TOKENIZER, synthetic_manifest
from benchmarks.common.measuring import medians, seconds
from benchmarks.common.provenance import RESULTS, provenance, write_results
from emkd.samples import Dataset
from emkd.samples.conversation import parse_turns
from emkd.samples.sample import sample_key, text_sha256
from emkd.storage.cache import Cache, create_cache
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.plan import DatasetFile
from emkd.storage.objects.local import LocalFiles
from emkd.storage.record import CapturedRow, ImageSpan, Record, RowHint, TopLogits
from emkd.storage.shards.writer import write_shard
from emkd.trainer.data.selection import select

ROWS_PER_SHARD = 256
ROWS_PER_GROUP = 1000
K, VOCABULARY = 4, 40
WORDS = ("the", "a", "red", "small", "picture", "shows", "what", "where", "cat", "table", "behind", "two", "people")

T = TypeVar("T")
Row = dict[str, Any]


def conversation(row: int) -> list[dict[str, str]]:
    """Return one to three questions with answers of 20 to 60 words, like instruction data; all rows differ."""
    rng = random.Random(row)
    turns: list[dict[str, str]] = []
    for number in range(rng.randint(1, 3)):
        question = " ".join(rng.choices(WORDS, k=12)) + "?"
        turns.append({"role": "user", "content": question if number else f"<image>\n{question}"})
        turns.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + f" {row}."})
    return turns


def image_png(row: int) -> bytes:
    """Return a small PNG, different for each row."""
    pixels = np.random.default_rng(row).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_json(path: Path, rows: list[int]) -> None:
    """Write rows as LLaVA-style JSON."""
    names = {"user": "human", "assistant": "gpt"}
    found = []
    for row in rows:
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in conversation(row)]
        found.append({"id": f"row-{row}", "image": f"images/{row // 1000}/{row}.png", "conversations": turns})
    path.write_text(json.dumps(found))


def write_parquet(path: Path, rows: list[int]) -> None:
    """Write rows as Parquet with images."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(image)), ("messages", pa.list_(turn))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            content = [
                {"id": f"row-{row}", "images": [{"bytes": image_png(row), "path": None}], "messages": conversation(row)}
                for row in rows[start : start + ROWS_PER_GROUP]
            ]
            writer.write_table(pa.Table.from_pylist(content, schema))


def some_logits(n: int) -> TopLogits:
    return TopLogits(
        ids=np.tile(np.arange(K, dtype=np.int32), (n, 1)),
        logits=np.tile(np.linspace(4, 1, K, dtype=np.float32), (n, 1)),
        tail_logsumexp=np.zeros(n, np.float32),
        tail_mean=np.zeros(n, np.float32),
    )


def some_record(n_text: int = 24, n_vision: int = 8, n_answer: int = 6) -> Record:
    """Return a well-formed record, the same for each row but for its key: a start reads only the index."""
    span = ImageSpan(text_position=2, start=0, count=n_vision, grids=((2, n_vision // 2),), original_size=(16, 16))
    return Record(
        key="",
        text_ids=np.arange(n_text, dtype=np.int32),
        images=(span,),
        vision=some_logits(n_vision),
        affinity=np.zeros((n_text, n_vision), np.float32),
        answer_positions=np.arange(n_text - n_answer, n_text, dtype=np.int32),
        answer=replace(some_logits(n_answer), tail_mean=None),
    )


def make_manifest(dataset: Dataset) -> Manifest:
    files = tuple(DatasetFile(name=f.name, n_rows=f.n_rows, n_bytes=f.n_bytes) for f in dataset.files)
    return synthetic_manifest(
        dataset.n_rows,
        ROWS_PER_SHARD,
        top_k=K,
        vocabulary=VOCABULARY,
        files=files,
        fingerprint=dataset.fingerprint,
    )


def captured(rows: range, record: Record) -> Iterator[CapturedRow]:
    for row in rows:
        turns = parse_turns(conversation(row))
        key = sample_key(turns, [image_png(row)])
        hint = RowHint(row=row, id=f"row-{row}")
        yield CapturedRow(hint=hint, key=key, record=replace(record, key=key), text_sha256=text_sha256(turns))


def make_cache(folder: Path, dataset: Dataset) -> None:
    """Write a sealed cache of a dataset's rows."""
    manifest, record = make_manifest(dataset), some_record()
    files: LocalFiles = create_cache(folder, manifest, TOKENIZER)
    for shard in manifest.shards:
        rows = list(captured(manifest.plan.rows(shard), record))
        commit_shard(files, write_shard(files, shard, "bench", rows, manifest))
    seal(files)


def make_all(folder: Path, n_rows: int) -> None:
    """Write the datasets and the cache."""
    half = random.Random(0).sample(range(n_rows), n_rows // 2)
    for name, rows in {"whole": list(range(n_rows)), "half": half}.items():
        write_json(folder / f"{name}.json", rows)
        write_parquet(folder / f"{name}.parquet", rows)
    make_cache(folder / "cache", Dataset(str(folder / "whole.json"), folder))


def start(folder: Path, data: str, partial: bool = False) -> dict[str, float]:
    """Return the seconds of each part of one start. Raises RuntimeError if a row is not found."""
    found: dict[str, float] = {}

    def timed(name: str, part: Callable[[], T]) -> T:
        result: list[T] = []
        found[name] = round(seconds(lambda: result.append(part())), 3)
        return result[0]

    dataset = timed("dataset", lambda: Dataset(str(folder / data), folder))
    timed("fingerprint", lambda: dataset.fingerprint)
    cache = timed("cache", lambda: Cache.open(folder / "cache", partial=partial))
    chosen = timed("select", lambda: select(cache, dataset, lambda text: None))
    if len(chosen.rows) != dataset.n_rows:
        raise RuntimeError(f"{data}: {len(chosen.rows)} of {dataset.n_rows} rows are in the cache, expected all")
    timed("hash", lambda: chosen.sha256(cache))
    return {**found, "total": round(sum(found.values()), 3)}


def measure(folder: Path, runs: int) -> dict[str, list[dict[str, float]]]:
    """Return raw repeats of every start."""
    cases = {
        "the same file (JSON)": "whole.json",
        "another format (Parquet)": "whole.parquet",
        "half of the rows, shuffled (JSON)": "half.json",
        "half of the rows, shuffled (Parquet)": "half.parquet",
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, data in cases.items():
            found[name].append(start(folder, data))
    (folder / "cache" / "seal.json").unlink()
    found["the same file, cache not sealed"] = [start(folder, "whole.json", partial=True) for _ in range(runs)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    origin = provenance()
    with tempfile.TemporaryDirectory(prefix="emkd-start-") as scratch:
        folder = Path(scratch)
        make_all(folder, arguments.rows)
        found = measure(folder, arguments.runs)
        n_bytes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    middle = {name: medians(runs) for name, runs in found.items()}
    for name, parts in middle.items():
        print(f"{name}: {parts}")
    content = {**origin, "rows": arguments.rows, "data_bytes": n_bytes, "median_s": middle, "seconds": found}
    write_results(RESULTS / "start_time.json", content)


if __name__ == "__main__":
    main()
