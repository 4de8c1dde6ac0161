"""A small cache of each format version, kept for ever: what was written once stays readable.

golden/v1/ was made by `make_golden`, and golden/v1.json holds its records as plain numbers. Run
`python -m tests.storage.test_golden` to make those of a new format version; never replace the old ones once
that version has been released.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from emkd.storage.cache import Cache, verify
from emkd.storage.manifest import FORMAT_VERSION

from .builders import TOKENIZER_JSON, array_fields, make_cache, make_manifest, make_rows

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = range(1, FORMAT_VERSION + 1)


def make_golden(version: int) -> None:
    """Three rows in two shards, the last one skipped; the records are exact as they come back."""
    manifest = make_manifest(n_rows=3, rows_per_shard=2, logits="bfloat16", affinity="float32")
    make_cache(GOLDEN / f"v{version}", manifest, skip=(2,))
    records = [row.record for shard in range(2) for row in make_rows(manifest, shard, skip=(2,))]
    expected = [
        {"key": record.key, "images": [vars(span) for span in record.images]}
        | {name: array.tolist() for name, array in array_fields(record).items()}
        for record in records
        if record is not None
    ]
    (GOLDEN / f"v{version}.json").write_text(json.dumps(expected) + "\n")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_format_version_stays_readable(version):
    expected = json.loads((GOLDEN / f"v{version}.json").read_text())
    assert verify(GOLDEN / f"v{version}") == []
    cache = Cache.open(GOLDEN / f"v{version}")
    assert cache.manifest.format_version == version
    assert cache.tokenizer_json == TOKENIZER_JSON
    assert cache.n_samples == len(expected)
    assert cache.skipped["reason"].to_pylist() == ["no_answer"]
    for i, numbers in enumerate(expected):
        record = cache.record(i)
        assert record.key == numbers["key"]
        images = json.loads(json.dumps([vars(span) for span in record.images]))
        assert images == numbers["images"]
        for name, array in array_fields(record).items():
            np.testing.assert_array_equal(array, np.array(numbers[name], array.dtype), err_msg=name)


if __name__ == "__main__":
    for missing in (v for v in VERSIONS if not (GOLDEN / f"v{v}.json").exists()):
        make_golden(missing)
