"""docs/format.md is enough to read a cache: a reader of thirty lines without emkd."""

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from .builders import array_fields, make_cache, make_manifest, make_rows


def opened(data: dict) -> dict:
    text = json.dumps(data["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == data["sha256"]
    return data["body"]


def checked(path: Path, expected: dict) -> bytes:
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (expected["n_bytes"], expected["sha256"]), path
    return data


def read(root: Path):
    objects = opened(json.loads((root / "seal.json").read_bytes()))["objects"]
    manifest = json.loads(checked(root / "manifest.json", objects["manifest.json"]))
    for n in range(manifest["plan"]["n_shards"]):
        checked(root / f"index/{n:06d}.parquet", objects[f"index/{n:06d}.parquet"])
        table = pq.read_table(root / f"index/{n:06d}.parquet")
        index = opened(json.loads(table.schema.metadata[b"emkd"]))
        folder = root / f"shards/{n:06d}-{index['attempt']}"
        stored = {name: Buffer.from_bytes(checked(folder / name, entry)) for name, entry in index["objects"].items()}
        arrays = {name: array[...] for name, array in zarr.open_group(MemoryStore(stored), mode="r").arrays()}
        for row in (row for row in table.to_pylist() if row["status"] == "ok"):
            part = {}
            for name, array in arrays.items():
                axis = name if name == "affinity" else name.split("_")[0]
                part[name] = array[row[f"{axis}_offset"] : row[f"{axis}_offset"] + row[f"{axis}_count"]]
                if name.endswith("_logits") and manifest["logits_precision"] == "bfloat16":
                    part[name] = (part[name].astype(np.uint32) << 16).view(np.float32)
            scale = 127 if manifest["affinity_precision"] == "int8" else 1
            part["affinity"] = part["affinity"].reshape(row["text_count"], -1).astype(np.float32) / np.float32(scale)
            yield row["key"], part


@pytest.mark.parametrize(("logits", "affinity"), [("bfloat16", "int8"), ("float16", "float16"), ("float32", "float32")])
def test_a_reader_of_thirty_lines(tmp_path, logits, affinity):
    manifest = make_manifest(logits=logits, affinity=affinity)
    make_cache(tmp_path, manifest)
    rows = [row for shard in range(3) for row in make_rows(manifest, shard) if row.record is not None]
    found = list(read(tmp_path))
    assert [key for key, _ in found] == [row.key for row in rows]
    for (_, part), row in zip(found, rows, strict=True):
        expected = array_fields(row.record)
        assert part.keys() == expected.keys()
        for name, array in expected.items():
            tolerance = {"int8": 0.5 / 127, "float16": 5e-4, "float32": 0}[affinity] if name == "affinity" else 0
            np.testing.assert_allclose(
                part[name].astype(np.float64), array, rtol=0, atol=tolerance + 1e-9, err_msg=name
            )


def test_it_has_thirty_lines_and_nothing_of_ours():
    tree = ast.parse(Path(__file__).read_text())
    reader = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in ("opened", "checked", "read")
    ]
    assert sum(node.end_lineno - node.lineno + 1 for node in reader) <= 30
    assert not any("emkd" in name.id for node in reader for name in ast.walk(node) if isinstance(name, ast.Name))
