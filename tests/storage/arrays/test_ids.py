"""Ids: whole, and split into their lower and upper bits."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from emkd.storage.arrays.ids import SplitIds, WholeIds, ids, join_ids, split_ids
from tests.storage.arrays.codec import ArrayCodecTests
from tests.storage.builders import make_manifest

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=70)
K = 3


class IdsTests(ArrayCodecTests):
    top = 200_000

    def values(self, rng, n):
        return np.sort(rng.integers(0, self.top, (n, K)).astype(np.int32))[:, ::-1].copy()


class TestIdsOfVersion1(IdsTests):
    form = WholeIds
    kind = ids("vision", K, make_manifest(n_tokens=200_000, format_version=1, compression=None))


class TestIdsOfVersion2WithLz4(IdsTests):
    form = WholeIds
    kind = ids("vision", K, make_manifest(n_tokens=200_000, format_version=2, compression="lz4"))


class TestIdsOfVersion2WithZstd(IdsTests):
    form = SplitIds
    kind = ids("vision", K, make_manifest(n_tokens=200_000, format_version=2))


class TestIdsOfVersion3(IdsTests):
    form = SplitIds
    kind = ids("answer", K, make_manifest(n_tokens=200_000))


class TestIdsOfVersion3WithLz4(IdsTests):
    form = SplitIds
    kind = ids("answer", K, make_manifest(n_tokens=200_000, compression="lz4"))


class TestIdsOfFewWords(IdsTests):
    """No id has more than 16 bits: one array."""

    form = SplitIds
    top = 65_536
    kind = ids("vision", K, make_manifest(n_tokens=65_536))

    def test_there_is_one_array(self):
        assert [layout.name for layout in self.kind.layouts] == ["vision_ids_low"]


@settings(deadline=None)
@given(arrays(np.int32, SHAPES, elements=st.integers(0, 2**24 - 1)))
def test_splitting(values):
    low, high = split_ids(values)
    assert (low.dtype, high.dtype) == (np.uint16, np.uint8)
    np.testing.assert_array_equal(join_ids(low, high), values)
    np.testing.assert_array_equal(join_ids(low, None), values % 65_536)
