"""Affinities: [text, vision], and [vision, text] with or without differences."""

import numpy as np
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from emkd.storage.arrays.affinity import AffinityByVision, PlainAffinity, affinity, along_tokens, from_tokens
from emkd.storage.precision import encode_affinity
from tests.storage.arrays.codec import ArrayCodecTests
from tests.storage.builders import make_manifest

N_TEXT = 4


class AffinityTests(ArrayCodecTests):
    is_view = True
    precision = "int8"

    def values(self, rng, n):
        return encode_affinity(rng.uniform(-1, 1, (N_TEXT, n)).astype(np.float32), self.precision)


class TestAffinityOfVersion1(AffinityTests):
    form = PlainAffinity
    kind = affinity(make_manifest(format_version=1, compression=None))


class TestAffinityWithLz4(AffinityTests):
    form = PlainAffinity
    kind = affinity(make_manifest(compression="lz4"))


class TestAffinityWithZstd(AffinityTests):
    form = AffinityByVision
    kind = affinity(make_manifest())


class TestAffinityInFloat16(AffinityTests):
    form, precision = AffinityByVision, "float16"
    kind = affinity(make_manifest(affinity="float16"))


class TestAffinityInFloat32(AffinityTests):
    form, precision = AffinityByVision, "float32"
    kind = affinity(make_manifest(affinity="float32", format_version=2))


@settings(deadline=None)
@given(arrays(np.int8, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=80)))
def test_differences(values):
    np.testing.assert_array_equal(from_tokens(along_tokens(values)), values)


def test_neighbours_are_subtracted_and_every_32nd_token_is_itself():
    values = np.arange(70, dtype=np.int8)[:, None] + np.array([[0, 5]], np.int8)
    differences = along_tokens(values)
    np.testing.assert_array_equal(differences[[0, 32, 64]], values[[0, 32, 64]])
    assert (np.delete(differences, [0, 32, 64], axis=0) == 1).all()
