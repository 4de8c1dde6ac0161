"""Kinds that are stored unchanged: positions and tails."""

import numpy as np

from emkd.storage.arrays.positions import Positions, answer_positions, text_ids
from emkd.storage.arrays.tails import Tail, tail
from tests.storage.arrays.codec import ArrayCodecTests
from tests.storage.builders import make_manifest


class TestTextIds(ArrayCodecTests):
    form = Positions
    kind = text_ids(make_manifest())

    def values(self, rng, n):
        return rng.integers(0, 2**31 - 1, n).astype(np.int32)


class TestAnswerPositions(TestTextIds):
    kind = answer_positions(make_manifest(format_version=1, compression=None))


class TestTailLogsumexp(ArrayCodecTests):
    form = Tail
    kind = tail("tail_logsumexp", "vision", make_manifest(compression="lz4"))

    def values(self, rng, n):
        return np.where(rng.random(n) < 0.1, -np.inf, rng.normal(5, 3, n)).astype(np.float32)


class TestTailMean(TestTailLogsumexp):
    kind = tail("tail_mean", "vision", make_manifest())
