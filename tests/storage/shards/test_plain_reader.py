"""docs/format.md suffices to read a cache: a reader in sixty lines without emkd."""

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

from tests.storage.builders import V, array_fields, make_cache, make_manifest, make_rows


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
                runs = [(row[f"{axis}_offset"], row[f"{axis}_count"])]
                runs = [(i["offset"], i["count"]) for i in row["images"]] if axis == "vision" else runs
                positions = np.concatenate([np.arange(0), *(start + np.arange(n) for start, n in runs)]).astype(int)
                part[name] = array[:, positions] if name.endswith("_logits") else array[positions]
            yield row, manifest, part


def unpacked(row: dict, manifest: dict, part: dict) -> dict:
    for kind in ("vision", "answer"):
        part[f"{kind}_ids"] = part.pop(f"{kind}_ids_low").astype(int) + 65536 * np.asarray(
            part.pop(f"{kind}_ids_high", 0), int
        )
        keys = part[f"{kind}_logits"].astype(int)
        keys = (2 * keys[:1] - keys.cumsum(axis=0)).T  # the first rank less all that follow
        bits = {"uint16": 16, "uint32": 32}[part[f"{kind}_logits"].dtype.name]
        keys, sign = keys % (1 << bits), 1 << (bits - 1)
        plain = np.where(keys >= sign, keys - sign, keys ^ (2 * sign - 1)).astype(f"u{bits // 8}")
        if manifest["logits_precision"].startswith("step"):
            part[f"{kind}_logits"] = (keys - sign) * float(manifest["logits_precision"][4:])
        elif manifest["logits_precision"] == "bfloat16":
            part[f"{kind}_logits"] = (plain.astype(np.uint32) << 16).view(np.float32)
        else:
            part[f"{kind}_logits"] = plain.view(manifest["logits_precision"])
    affinity = part["affinity"].reshape(-1, row["text_count"])
    if manifest["affinity_precision"] == "int8":
        runs = [affinity[i : i + 32].cumsum(axis=0, dtype=np.int8) for i in range(0, len(affinity), 32)]
        affinity = np.concatenate([affinity[:0], *runs]) / np.float32(127)
    return part | {"affinity": affinity.T}


@pytest.mark.parametrize(
    ("logits", "affinity", "n_tokens"),
    [
        ("bfloat16", "int8", V),
        ("float16", "float16", V),
        ("float32", "float32", 200_000),
        ("step0.1", "int8", 200_000),
    ],
)
def test_a_reader_of_sixty_lines(tmp_path, logits, affinity, n_tokens):
    manifest = make_manifest(logits=logits, affinity=affinity, n_tokens=n_tokens)
    make_cache(tmp_path, manifest)
    rows = [row for shard in range(3) for row in make_rows(manifest, shard) if row.record is not None]
    found = list(read(tmp_path))
    assert [entry["key"] for entry, _, _ in found] == [row.key for row in rows]
    for stored, row in zip(found, rows, strict=True):
        part, expected = unpacked(*stored), array_fields(row.record)
        assert part.keys() == expected.keys()
        for name, array in expected.items():
            tolerance = {"int8": 0.5 / 127, "float16": 5e-4, "float32": 0}[affinity] if name == "affinity" else 1e-6
            np.testing.assert_allclose(
                part[name].astype(np.float64), array, rtol=0, atol=tolerance + 1e-9, err_msg=name
            )


def test_it_has_sixty_lines_and_nothing_of_ours():
    tree = ast.parse(Path(__file__).read_text())
    reader = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in ("opened", "checked", "read", "unpacked")
    ]
    assert sum(node.end_lineno - node.lineno + 1 for node in reader) <= 60
    assert not any("emkd" in name.id for node in reader for name in ast.walk(node) if isinstance(name, ast.Name))
