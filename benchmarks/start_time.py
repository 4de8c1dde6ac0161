"""How long a training run takes to know its data: 100,000 rows, from the files to the selected samples.

    python benchmarks/start_time.py --rows 100000 --runs 3

Makes a sealed cache of so many rows in a folder that is thrown away, by the storage's own writer and without a
teacher, and the data that it is of: as LLaVA-style JSON, whose images are nowhere (nothing may open one), as Parquet
with images, and half of the rows of either, shuffled. Then the parts of each start are timed, the starts in turn, with
a warm page cache. Writes benchmarks/results/start_time.json.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from provenance import provenance

from emkd.samples import Dataset
from emkd.samples.sample import parse_turns, sample_key, text_sha256
from emkd.storage.cache import Cache, create_cache
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import ImageProcessorIdentity, Manifest, TeacherIdentity, TokenizerIdentity
from emkd.storage.manifest.plan import DatasetFile, DatasetIdentity, ShardPlan
from emkd.storage.objects.digest import sha256_hex
from emkd.storage.objects.local import LocalFiles
from emkd.storage.record import CapturedRow, ImageSpan, Record, RowHint, TopLogits
from emkd.storage.shards.writer import write_shard
from emkd.trainer.data.selection import select

ROWS_PER_SHARD = 256
ROWS_PER_GROUP = 1000
TOKENIZER = b'{"version": "1.0", "model": {"type": "WordLevel"}}'
K, VOCABULARY = 4, 40
WORDS = ("the", "a", "red", "small", "picture", "shows", "what", "where", "cat", "table", "behind", "two", "people")

T = TypeVar("T")
Row = dict[str, Any]


def conversation(row: int) -> list[dict[str, str]]:
    """One to three questions with answers of 20 to 60 words, as instruction data have them; no two rows the same."""
    rng = random.Random(row)
    turns: list[dict[str, str]] = []
    for number in range(rng.randint(1, 3)):
        question = " ".join(rng.choices(WORDS, k=12)) + "?"
        turns.append({"role": "user", "content": question if number else f"<image>\n{question}"})
        turns.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + f" {row}."})
    return turns


def picture(row: int) -> bytes:
    """A small PNG, another one for each row."""
    pixels = np.random.default_rng(row).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_json(path: Path, rows: list[int]) -> None:
    names = {"user": "human", "assistant": "gpt"}
    found = []
    for row in rows:
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in conversation(row)]
        found.append({"id": f"row-{row}", "image": f"images/{row // 1000}/{row}.png", "conversations": turns})
    path.write_text(json.dumps(found))


def write_parquet(path: Path, rows: list[int]) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(image)), ("messages", pa.list_(turn))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            content = [
                {"id": f"row-{row}", "images": [{"bytes": picture(row), "path": None}], "messages": conversation(row)}
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
    """Well formed, and the same for each row but for its key: what a start reads is the index."""
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
    return Manifest(
        teacher=TeacherIdentity(name="none", weights_sha256="00" * 32, dtype="float32", architecture="none"),
        image_processor=ImageProcessorIdentity(class_name="none", sha256="00" * 32, settings={}),
        tokenizer=TokenizerIdentity(sha256=sha256_hex(TOKENIZER), n_tokens=VOCABULARY, lm_head_rows=VOCABULARY),
        top_k=K,
        answer_top_k=K,
        batch_tokens=1024,
        dataset=DatasetIdentity(fingerprint=dataset.fingerprint, n_rows=dataset.n_rows, files=files),
        plan=ShardPlan.of(n_rows=dataset.n_rows, rows_per_shard=ROWS_PER_SHARD),
    )


def captured(rows: range, record: Record) -> Iterator[CapturedRow]:
    for row in rows:
        turns = parse_turns(conversation(row))
        key = sample_key(turns, [picture(row)])
        hint = RowHint(row=row, id=f"row-{row}")
        yield CapturedRow(hint=hint, key=key, record=replace(record, key=key), text_sha256=text_sha256(turns))


def make_cache(folder: Path, dataset: Dataset) -> None:
    manifest, record = make_manifest(dataset), some_record()
    files: LocalFiles = create_cache(folder, manifest, TOKENIZER)
    for shard in manifest.shards:
        rows = list(captured(manifest.plan.rows(shard), record))
        commit_shard(files, write_shard(files, shard, "bench", rows, manifest))
    seal(files)


def make_all(folder: Path, n_rows: int) -> None:
    half = random.Random(0).sample(range(n_rows), n_rows // 2)
    for name, rows in {"whole": list(range(n_rows)), "half": half}.items():
        write_json(folder / f"{name}.json", rows)
        write_parquet(folder / f"{name}.parquet", rows)
    make_cache(folder / "cache", Dataset(str(folder / "whole.json"), folder))


def start(folder: Path, data: str, partial: bool = False) -> dict[str, float]:
    """Seconds of each part of one start."""
    found: dict[str, float] = {}

    def timed(name: str, part: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = part()
        found[name] = round(time.perf_counter() - began, 3)
        return result

    dataset = timed("dataset", lambda: Dataset(str(folder / data), folder))
    timed("fingerprint", lambda: dataset.fingerprint)
    cache = timed("cache", lambda: Cache.open(folder / "cache", partial=partial))
    chosen = timed("select", lambda: select(cache, dataset, lambda text: None))
    if len(chosen.rows) != dataset.n_rows:
        raise RuntimeError(f"{data}: {len(chosen.rows)} of {dataset.n_rows} rows were found")
    timed("hash", lambda: chosen.sha256(cache))
    return {**found, "total": round(sum(found.values()), 3)}


def measure(folder: Path, runs: int) -> dict[str, list[dict[str, float]]]:
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
    medians = {name: {part: median(run[part] for run in runs) for part in runs[0]} for name, runs in found.items()}
    for name, parts in medians.items():
        print(f"{name}: {parts}")
    path = Path(__file__).parent / "results" / "start_time.json"
    content = {**origin, "rows": arguments.rows, "data_bytes": n_bytes, "median_s": medians, "seconds": found}
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
