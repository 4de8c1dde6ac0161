"""Which rows the preflight reads."""

import pytest

from emkd.pipeline.preflight import PREFLIGHT_ROWS, spread
from emkd.storage.manifest.plan import DatasetIdentity, Extension
from tests.storage.builders import make_manifest


def extended(manifest, rows):
    """Six shards, followed by some rows of another dataset."""
    last = rows[-1][1]
    extension = Extension(
        number=1, parent_sha256=manifest.plan_sha256, dataset=DatasetIdentity(fingerprint="e", n_rows=last, files=()),
        n_rows=sum(b - a for a, b in rows), kept=((0, 6),), first_shard=6, rows_per_shard=3, rows=rows,
    )  # fmt: skip
    return manifest.model_copy(update={"extensions": (extension,)})


@pytest.mark.parametrize("shards", [[0], [3, 5], list(range(6)), [4, 5, 6, 9], [12]])
def test_a_few_rows_evenly_spread_as_from_a_list_of_all(shards):
    manifest = extended(make_manifest(n_rows=41, rows_per_shard=7), ((0, 5), (8, 9), (20, 33)))
    rows = [row for shard in shards for row in manifest.rows(shard)]
    n = min(PREFLIGHT_ROWS, len(rows))
    assert spread(manifest, shards) == (len(rows), [rows[len(rows) * i // n] for i in range(n)])
