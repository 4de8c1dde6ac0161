"""Which images of a shard's rows become one: those of equal keys whose numbers agree."""

from dataclasses import replace

import numpy as np
import pytest

from emkd.pipeline.shared import SharedImages
from tests.storage.builders import array_fields, make_manifest, make_record

MANIFEST = make_manifest(logits="float32")


def record(seed, sizes=(5, 7)):
    return make_record(np.random.default_rng(seed), MANIFEST, image_sizes=sizes)


def nearly(other, error):
    """The same vision tokens of another batch."""
    noise = np.random.default_rng(9).uniform(-error, error, other.vision_logits.shape)
    return replace(other, vision_logits=(other.vision_logits + noise).astype(np.float32))


def equal(a, b):
    return all(np.array_equal(array_fields(a)[name], array_fields(b)[name]) for name in array_fields(a))


def test_the_first_rows_numbers_are_taken():
    first, second = record(0), nearly(record(0), 1e-4)
    shared = SharedImages(["a", "b", "a", "b"], "float32")
    assert shared.unify(first, ["a", "b"]) is first
    assert not equal(second, first)
    assert equal(shared.unify(second, ["a", "b"]), first)
    assert (shared.n_shared, shared.n_different) == (2, 0)


def test_one_image_of_two():
    """And a row's own text and affinity stay."""
    first, other = record(0), record(1, (5, 7))
    start = replace(other, vision_logits=np.concatenate([first.vision_logits[:5], other.vision_logits[5:]]))
    start = replace(
        start, vision_tail_logsumexp=np.concatenate([first.vision_tail_logsumexp[:5], other.vision_tail_logsumexp[5:]])
    )
    start = replace(start, vision_tail_mean=np.concatenate([first.vision_tail_mean[:5], other.vision_tail_mean[5:]]))
    shared = SharedImages(["a", "b", "a", "c"], "float32")
    shared.unify(first, ["a", "b"])
    found = shared.unify(start, ["a", "c"])
    np.testing.assert_array_equal(found.vision_ids[:5], first.vision_ids[:5])
    np.testing.assert_array_equal(found.vision_ids[5:], other.vision_ids[5:])
    np.testing.assert_array_equal(found.affinity, other.affinity)
    assert (shared.n_shared, shared.n_different) == (1, 0)


@pytest.mark.parametrize(
    ("dtype", "error", "agrees"),
    [
        ("float32", 2e-3, True),
        ("float32", 0.05, False),
        ("bfloat16", 0.05, True),
        ("bfloat16", 1.0, False),
        ("float64", 1e-5, False),
    ],
)
def test_what_differs_by_more_than_rounding_keeps_its_own(dtype, error, agrees):
    first, second = record(0), nearly(record(0), error)
    shared = SharedImages(["a", "b"] * 2, dtype)
    shared.unify(first, ["a", "b"])
    found = shared.unify(second, ["a", "b"])
    assert equal(found, first if agrees else second)
    assert (shared.n_shared, shared.n_different) == ((2, 0) if agrees else (0, 2))


@pytest.mark.parametrize("name", ["vision_tail_logsumexp", "vision_tail_mean"])
def test_tails_have_to_agree_as_well(name):
    first = record(0)
    second = replace(first, **{name: getattr(first, name) + np.float32(0.3)})
    shared = SharedImages(["a", "b"] * 2, "float32")
    shared.unify(first, ["a", "b"])
    assert shared.unify(second, ["a", "b"]) is second
    assert shared.n_different == 2


def test_an_image_of_another_size_is_another_one():
    shared = SharedImages(["a", "b"] * 2, "float32")
    shared.unify(record(0), ["a", "b"])
    other = record(0, (7, 5))
    assert shared.unify(other, ["a", "b"]) is other


def test_numbers_are_held_no_longer_than_somebody_waits():
    """Nothing of images that come once, and nothing after the last row, which may be one that was skipped."""
    shared = SharedImages(["a", "b", "a", "c", "a"], "float32")
    shared.unify(record(0), ["a", "b"])
    assert list(shared._first) == ["a"]
    shared.unify(record(0), ["a", "c"])
    assert list(shared._first) == ["a"]
    shared.skip(["a"])
    assert not shared._first
