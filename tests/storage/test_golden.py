"""A small cache of each format version, kept for ever: every version stays readable.

golden/v<n>/ was written by `make_golden` when version n was the newest, and golden/v<n>.json holds its records as plain
numbers. v<n>-lz4 is compressed with lz4, for versions in which that changes the layout of arrays. Run `python -m
tests.storage.test_golden` to write the caches of a new format version; never replace the old ones.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import FORMAT_VERSION
from emkd.storage.record import CapturedRow, RowHint
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import (
    TOKENIZER_JSON,
    array_fields,
    changed,
    coded_manifest,
    make_basis,
    make_record,
    row_of,
    with_image,
)

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_BASIS = make_basis(n_tokens=40)  # as if most of the 140,000 ids had no logits, to keep the file small
VERSIONS = range(1, FORMAT_VERSION + 1)
NAMES = [f"v{version}" for version in VERSIONS] + [f"v{version}-lz4" for version in VERSIONS if version > 1]


def golden_rows(manifest, shard):
    """Three rows in two shards, the last row skipped: ids on both sides of 65,536, more vision tokens than one run of
    differences has, and an image that two samples share."""
    rng = np.random.default_rng(2)
    first, second = (
        make_record(rng, manifest, image_sizes=sizes, n_text=4 + i) for i, sizes in enumerate(((40, 3), (5, 40)))
    )
    records = [wide(first), wide(with_image(second, 1, first, 0))]
    skipped = CapturedRow(hint=RowHint(row=2, id=""), key="", record=None, reason="no_answer", detail="empty turn")
    rows = [*(row_of(record, i) for i, record in enumerate(records)), skipped]
    return [row for row in rows if row.hint.row in manifest.rows(shard)]


def wide(record):
    """The record with about half of the ids above 65,536, and cosines that int8 stores exactly."""
    cosines = None if record.affinity is None else np.rint(record.affinity * np.float32(127)) / np.float32(127)
    ids = {
        name: array_fields(record)[name] + np.int32(65_536) * (array_fields(record)[name] % 2)
        for name in ("vision_ids", "answer_ids")
    }
    return changed(record, affinity=cosines, **ids)


def make_golden(name: str, compression: str, affinity: str) -> None:
    """Write a golden cache of the newest version, and its records. Reading gives exactly these numbers."""
    manifest = coded_manifest(
        n_rows=3, rows_per_shard=2, n_tokens=140_000, compression=compression, affinity=affinity, basis=GOLDEN_BASIS
    )
    folder = GOLDEN / name
    files = create_cache(folder, manifest, TOKENIZER_JSON, GOLDEN_BASIS.to_bytes())
    rows = {shard: golden_rows(manifest, shard) for shard in range(2)}
    for shard, captured in rows.items():
        assert commit_shard(files, write_shard(files, shard, f"a{shard}", captured, manifest))
    seal(files)
    expected = [
        {"key": row.key, "images": [vars(span) for span in row.record.images]}
        | {name: array.tolist() for name, array in array_fields(row.record).items() if array is not None}
        for captured in rows.values()
        for row in captured
        if row.record is not None
    ]
    (GOLDEN / f"{name}.json").write_text(json.dumps(expected) + "\n")


def test_there_are_those_of_each_version():
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_version_stays_readable(name):
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    assert verify(GOLDEN / name) == []
    cache = Cache.open(GOLDEN / name)
    compression = None if name == "v1" else "lz4" if name.endswith("-lz4") else "zstd"
    assert (f"v{cache.manifest.format_version}", cache.manifest.compression) == (name.split("-")[0], compression)
    assert cache.tokenizer_json == TOKENIZER_JSON
    assert cache.n_samples == len(expected)
    assert cache.skipped["reason"].to_pylist() == ["no_answer"]
    for i, numbers in enumerate(expected):
        record = cache.record(i)
        assert record.key == numbers["key"]
        images = json.loads(json.dumps([vars(span) for span in record.images]))
        assert images == numbers["images"]
        fields = array_fields(record)
        assert {field for field, array in fields.items() if array is not None} == numbers.keys() - {"key", "images"}
        for field, array in fields.items():
            if array is None:
                continue
            np.testing.assert_array_equal(array, np.array(numbers[field], array.dtype), err_msg=field)


if __name__ == "__main__":
    make_golden(f"v{FORMAT_VERSION}", "zstd", "stored")
    make_golden(f"v{FORMAT_VERSION}-lz4", "lz4", "codes")
