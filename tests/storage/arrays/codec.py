"""Tests of the contract of a kind of array. For a new kind or form, subclass `ArrayCodecTests`."""

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from emkd.storage.arrays.chunks import StoredArray, chunk_name, encode_chunk, metadata

SIZES = [0, 1, 31, 32, 33, 70]


class ArrayCodecTests:
    """kind: an `ArrayKind`;  form: the class that the manifest has to select

    is_view: what comes back may be a view, as of logits and affinities, which `precision` decodes to new memory
    """

    kind = None
    form = None
    is_view = False

    def values(self, rng, n):
        """Values of a sample with n tokens."""
        raise NotImplementedError

    def some(self, n, seed=0):
        return self.values(np.random.default_rng(seed), n)

    def test_the_manifest_leads_to_this_form(self):
        assert type(self.kind) is self.form

    @pytest.mark.parametrize("n", SIZES)
    def test_what_is_encoded_comes_back_exactly(self, n):
        values = self.some(n)
        found = self.kind.decode(self.kind.encode(values), values.shape)
        assert (found.dtype, found.shape) == (values.dtype, values.shape)
        np.testing.assert_array_equal(found, values)

    @pytest.mark.parametrize("n", SIZES)
    def test_values_are_left_as_they_are(self, n):
        values = self.some(n)
        before = values.copy()
        arrays = self.kind.encode(values)
        stored = {name: array.copy() for name, array in arrays.items()}
        self.kind.decode(arrays, values.shape)
        np.testing.assert_array_equal(values, before)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, stored[name])

    def test_what_comes_back_has_its_own_memory(self):
        """A reader's arrays are reused for the next shard."""
        values = self.some(40)
        arrays = self.kind.encode(values)
        found = self.kind.decode(arrays, values.shape)
        assert self.is_view or not any(np.shares_memory(found, array) for array in arrays.values())

    @pytest.mark.parametrize("n", SIZES)
    def test_arrays_are_those_of_the_layouts(self, n):
        arrays = self.kind.encode(self.some(n))
        assert list(arrays) == [layout.name for layout in self.kind.layouts]
        for layout in self.kind.layouts:
            length = arrays[layout.name].shape[layout.token_axis]
            assert (arrays[layout.name].dtype, arrays[layout.name].shape) == (layout.dtype, layout.shape(length))

    def test_samples_are_appended_and_cut_out_again(self):
        """Along the layouts' axis, as a shard's writer and reader do."""
        samples = [self.some(n, seed=n) for n in (5, 1, 40)]
        encoded = [self.kind.encode(values) for values in samples]
        for i, values in enumerate(samples):
            cut = {}
            for layout in self.kind.layouts:
                parts = [arrays[layout.name] for arrays in encoded]
                lengths = [part.shape[layout.token_axis] for part in parts]
                whole = np.concatenate(parts, axis=layout.token_axis)
                own = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
                cut[layout.name] = whole[:, own] if layout.by_rank else whole[own]
            np.testing.assert_array_equal(self.kind.decode(cut, values.shape), values)

    def test_any_zarr_reader_opens_them(self):
        """emkd's own reader of chunks reads the same."""
        arrays = self.kind.encode(self.some(40))
        for layout in self.kind.layouts:
            array = arrays[layout.name]
            length = array.shape[layout.token_axis]
            described, chunk = metadata(layout, length, length), encode_chunk(layout, array)
            name = chunk_name(layout, 0)
            objects = {"zarr.json": described, name: chunk}
            store = MemoryStore({key: zarr.core.buffer.cpu.Buffer.from_bytes(data) for key, data in objects.items()})
            np.testing.assert_array_equal(zarr.open_array(store, mode="r")[...], array)
            stored = StoredArray.of("here", described, layout, length)
            assert stored.chunk_names() == [name]
            found = np.empty(stored.chunk, layout.dtype)
            stored.decode("here", chunk, found)
            np.testing.assert_array_equal(found, array)
