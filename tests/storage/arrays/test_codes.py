"""Codes of hidden states: frames as bytes, and the kind of array that they make."""

import numpy as np
import pytest

from emkd.errors import DamagedCacheError
from emkd.storage.arrays.chunks import encode_chunk
from emkd.storage.arrays.codes import CodeFrames, codes
from emkd.storage.arrays.frames import decode_frame, encode_frame
from tests.storage.arrays.codec import ArrayCodecTests
from tests.storage.builders import make_basis

GROUPS = (1, 2, 3, 4, 2)
R = sum(GROUPS)
SPREAD = np.repeat([3000.0, 40.0, 3.0, 0.8, 0.0], GROUPS)  # a group in each form


def some_codes(rng, n):
    return np.rint(rng.normal(size=(n, R)) * SPREAD).astype(np.int16)


class TestVisionCodes(ArrayCodecTests):
    form = CodeFrames
    kind = codes("vision", make_basis(GROUPS).identity(b""))

    def values(self, rng, n):
        return some_codes(rng, n)

    def test_codes_take_one_byte_in_memory_if_all_fit(self):
        """Half of what a loader keeps and sends; one large number in any frame makes all of the sample two bytes."""
        rng = np.random.default_rng(0)
        small, large = some_codes(rng, 5).clip(-128, 127), some_codes(rng, 4)
        large[0, 0] = 128
        for parts, dtype in (((small, small), np.int8), ((small, large), np.int16), ((large, small), np.int16)):
            encoded = [self.kind.encode(part) for part in parts]
            arrays = {name: np.concatenate([one[name] for one in encoded]) for name in encoded[0]}
            values = np.concatenate(parts)
            found = self.kind.decode(arrays, values.shape)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, values)
            np.testing.assert_equal(self.kind.encode(found), self.kind.encode(values))  # as it is when copied


class TestAnswerCodes(TestVisionCodes):
    kind = codes("answer", make_basis(GROUPS).identity(b""))


def decoded(frame, n, groups=GROUPS):
    out = np.empty((sum(groups), n), np.int16)
    decode_frame("here", frame, groups, out)
    return out.T


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 577])
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 8, 9, 15])
def test_every_number_of_a_width_comes_back(n, bits):
    """The extremes of each form, and one beyond them."""
    low, high = (0, 0) if bits == 0 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    rng = np.random.default_rng(bits)
    values = rng.integers(low, high + 1, (n, 3)).astype(np.int16)
    values[0] = [low, high, 0]
    np.testing.assert_array_equal(decoded(encode_frame(values, (2, 1)), n, (2, 1)), values)


def test_the_most_negative_number_comes_back():
    values = np.array([[-32768, 32767, -129, 128, -8, 7, -2, 1]], np.int16).T.copy()
    np.testing.assert_array_equal(decoded(encode_frame(values, (1,)), 8, (1,)), values)


def test_zstd_looks_for_no_repeats(monkeypatch):
    """What it would find in noise by chance takes more bytes than it saves; other readers need not know."""
    rng = np.random.default_rng(0)
    spread = np.linspace(0.6, 0.2, 64)
    values = np.rint(rng.normal(size=(1024, 64)) * spread).astype(np.int16)
    weak = encode_frame(values, (32, 32))
    monkeypatch.setattr("emkd.storage.arrays.frames._SEARCH", {})
    usual = encode_frame(values, (32, 32))
    assert len(weak) < 0.98 * len(usual)
    for frame in (weak, usual):
        np.testing.assert_array_equal(decoded(frame, 1024, (32, 32)), values)


def test_little_entropy_takes_less_than_a_bit_for_most_numbers():
    """One number in fifty is not 0: entropy 0.16 bits."""
    values = (np.random.default_rng(0).random((4096, 8)) < 0.02).astype(np.int16)
    assert 8 * len(encode_frame(values, (8,))) / values.size < 0.35


def test_bytes_are_near_the_entropy_of_each_column():
    values = some_codes(np.random.default_rng(0), 4096)
    entropy = 0.0
    for column in values[:, 1:].T:
        p = np.unique(column, return_counts=True)[1] / len(column)
        entropy -= len(column) * float(p @ np.log2(p))
    assert 8 * (len(encode_frame(values, GROUPS)) - 2 * 4096) < 1.1 * entropy  # less the first column's two bytes each


def test_other_groups_are_refused():
    with pytest.raises(ValueError, match="groups of 12 columns, codes have 11"):
        encode_frame(np.zeros((3, 11), np.int16), GROUPS)


@pytest.mark.parametrize("change", ["cut", "more", "form", "flipped", "other length"])
def test_damage_is_an_error_and_not_another_number(change):
    frame = bytearray(encode_frame(some_codes(np.random.default_rng(0), 50), GROUPS))
    n = 50
    if change == "cut":
        frame = frame[:-3]
    elif change == "more":
        frame += b"x"
    elif change == "form":
        frame[0] = 3
    elif change == "flipped":
        frame[1] ^= 0x40
    else:
        n = 49
    with pytest.raises(DamagedCacheError, match="here: "):
        decoded(bytes(frame), n)


def test_zeros_that_fill_the_last_chunk_take_nothing_and_frames_hardly_more_than_they_are():
    layout, size = TestVisionCodes.kind.layouts[0], 1 << 20
    frames = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    assert len(encode_chunk(layout, frames)) < size + 1000
    frames[1000:] = 0
    assert len(encode_chunk(layout, frames)) < 10_000
