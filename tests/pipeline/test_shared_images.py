"""Which images of a shard's rows are stored once: images of equal keys whose numbers agree."""

from dataclasses import replace

import numpy as np
import pytest

from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.pipeline.shared_images import SharedImages
from emkd.samples import Dataset
from emkd.storage.cache import Cache
from emkd.storage.record import CapturedRow, RowHint, TopLogits
from emkd.vlm import load
from tests import tiny
from tests.pipeline.test_capture_shard import begin
from tests.storage.builders import array_fields, changed, make_manifest, make_record

MANIFEST = make_manifest(logits="float32")


def record(seed, sizes=(5, 7)):
    return make_record(np.random.default_rng(seed), MANIFEST, image_sizes=sizes)


def nearly(other, error):
    """The same vision tokens of another batch."""
    noise = np.random.default_rng(9).uniform(-error, error, other.vision.logits.shape)
    return changed(other, vision_logits=(other.vision.logits + noise).astype(np.float32))


def expecting(keys, dtype):
    shared = SharedImages(dtype)
    shared.expect(keys)
    return shared


def equal(a, b):
    return all(np.array_equal(array_fields(a)[name], array_fields(b)[name]) for name in array_fields(a))


def test_the_first_rows_numbers_are_taken():
    first, second = record(0), nearly(record(0), 1e-4)
    shared = expecting(["a", "b", "a", "b"], "float32")
    assert shared.unify(first, ["a", "b"]) is first
    assert not equal(second, first)
    assert equal(shared.unify(second, ["a", "b"]), first)
    assert (shared.n_shared, shared.n_different) == (2, 0)


def test_one_image_of_two():
    """And a row's own text and affinity stay."""
    first, other = record(0), record(1, (5, 7))
    vision = TopLogits.joined([first.vision.tokens(slice(5)), other.vision.tokens(slice(5, None))])
    start = replace(other, vision=replace(vision, ids=other.vision.ids))
    shared = expecting(["a", "b", "a", "c"], "float32")
    shared.unify(first, ["a", "b"])
    found = shared.unify(start, ["a", "c"])
    np.testing.assert_array_equal(found.vision.ids[:5], first.vision.ids[:5])
    np.testing.assert_array_equal(found.vision.ids[5:], other.vision.ids[5:])
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
    shared = expecting(["a", "b"] * 2, dtype)
    shared.unify(first, ["a", "b"])
    found = shared.unify(second, ["a", "b"])
    assert equal(found, first if agrees else second)
    assert (shared.n_shared, shared.n_different) == ((2, 0) if agrees else (0, 2))


@pytest.mark.parametrize("name", ["vision_tail_logsumexp", "vision_tail_mean"])
def test_tails_have_to_agree_as_well(name):
    first = record(0)
    second = changed(first, **{name: array_fields(first)[name] + np.float32(0.3)})
    shared = expecting(["a", "b"] * 2, "float32")
    shared.unify(first, ["a", "b"])
    assert shared.unify(second, ["a", "b"]) is second
    assert shared.n_different == 2


def test_an_image_of_another_size_is_another_one():
    shared = expecting(["a", "b"] * 2, "float32")
    shared.unify(record(0), ["a", "b"])
    other = record(0, (7, 5))
    assert shared.unify(other, ["a", "b"]) is other


def test_numbers_are_held_no_longer_than_somebody_waits():
    """It holds nothing of images that occur once, and nothing after the last row, which may be a skipped row."""
    shared = expecting(["a", "b", "a", "c", "a"], "float32")
    shared.unify(record(0), ["a", "b"])
    assert list(shared._first) == ["a"]
    shared.unify(record(0), ["a", "c"])
    assert list(shared._first) == ["a"]
    row = CapturedRow(hint=RowHint(row=2, id=""), key="", record=None, reason="not-finite", image_keys=("a",))
    assert shared.apply(row) is row
    assert not shared._first


def ask(images, question):
    return {
        "id": question,
        "images": images,
        "messages": [tiny.turn("user", question), tiny.turn("assistant", "red cat")],
    }


ONE, TWO, THREE = tiny.png(1), tiny.png(2), tiny.png(3)
ROWS = [
    ask([ONE], "<image>\nwhat is in this picture"),
    ask([ONE], "<image>\nwhat"),  # as the first
    ask([ONE], "what is <image>"),  # after another text
    ask([TWO], "<image>\nwhat"),  # another image
    ask([ONE, TWO], "<image> and <image> what is that"),  # the first image is that of the first row
    ask([ONE, THREE], "<image> and <image> what"),  # the second one is not
    ask([ONE, TWO], "<image> and <image> what"),  # both are shared
    {**ask([ONE], "<image>\nwhat"), "messages": [tiny.turn("user", "<image>\nwhat")]},  # nobody answers
]
OFFSETS = [[0], [0], [16], [32], [0, 48], [0, 64], [0, 48]]


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_a_jobs_rows_of_one_image(teacher_path, tmp_path, batch_tokens):
    """Stored once; except for rounding, a reader gets the outputs of each row's own pass."""
    data = tiny.write_data(tmp_path / "rows.parquet", ROWS)
    chosen = {"batch_tokens": batch_tokens, "precision": "float32", "affinity_precision": "float32", "top_k": 5}
    cache = Cache.open(tiny.make_cache(teacher_path, data, tmp_path / "cache", rows_per_shard=8, **chosen))
    images = [row["images"] for row in cache.samples.to_pylist()]
    places = sorted({image["offset"] for spans in images for image in spans})
    assert places == [16 * i for i in range(5)]
    found = [[places.index(image["offset"]) for image in spans] for spans in images]
    expected = [[offset // 16 for offset in offsets] for offsets in OFFSETS]
    assert len({tuple(pair) for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)}) == 5
    settings = CaptureSettings(
        top_k=5, answer_top_k=5, logits_precision="float32", batch_tokens=batch_tokens, max_length=None
    )
    own = Teacher(load(str(teacher_path)), settings).capture(Dataset(str(data)), range(7))
    for i, row in enumerate(own):
        record = cache.record(i)
        np.testing.assert_allclose(record.vision.logits, row.record.vision.logits, atol=1e-5)
        np.testing.assert_allclose(record.vision.tail_logsumexp, row.record.vision.tail_logsumexp, atol=1e-5)
        np.testing.assert_array_equal(record.affinity, row.record.affinity)
        assert record.images == row.record.images


def test_no_images_in_common_cost_nothing(teacher_path, data_path, tmp_path):
    """The same objects, bit for bit, as without looking for them."""
    data = Dataset(str(data_path))
    settings = CaptureSettings(top_k=5, answer_top_k=5, logits_precision="float32", batch_tokens=200, max_length=None)
    teacher = Teacher(load(str(teacher_path)), settings)
    shared = SharedImages("float32")
    for found, expected in zip(teacher.capture(data, range(6), shared), teacher.capture(data, range(6)), strict=True):
        assert equal(found.record, expected.record)
    assert (shared.n_shared, shared.n_different) == (0, 0)


def test_the_jobs_worker_looks_for_them(teacher_path, tmp_path):
    """Not only where batches happen to give bit-equal numbers: it counts what it took from another row."""
    data = tiny.write_data(tmp_path / "rows.parquet", ROWS)
    report = begin(teacher_path, data, tmp_path / "cache").capture_shard(0)
    assert (report.n_samples, report.n_skipped) == (7, 1)
    assert (report.n_shared, report.n_different) == (sum(map(len, OFFSETS)) - 5, 0)
