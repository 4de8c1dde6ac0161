"""The teacher's pass against the model called directly, one sample at a time."""

import weakref

import numpy as np
import pytest
import torch

from emkd.errors import ModelError
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.samples import Dataset, encode
from emkd.storage.cache import Cache
from emkd.vlm import load
from tests import tiny
from tests.storage.builders import array_fields
from tests.trainer import dense

V = len(tiny.VOCABULARY)


def teacher(path, **options) -> Teacher:
    chosen = {"top_k": V, "answer_top_k": V, "logits_precision": "float32", "batch_tokens": 200, "max_length": None}
    return Teacher(load(str(path)), CaptureSettings(**{**chosen, **options}))


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_records_are_what_the_model_answers_alone(teacher_path, data_path, batch_tokens):
    found = teacher(teacher_path, batch_tokens=batch_tokens)
    captured = found.capture(Dataset(str(data_path)), range(6))
    for row, result in zip(tiny.rows(), captured, strict=True):
        record = result.record
        with torch.no_grad():
            alone = dense.view(found.vlm.model, found.vlm.processor, row, 16, V)
        vision = torch.cat(alone.vision_logits) if row["images"] else torch.zeros(0, V)
        assert_logits(record.vision.ids, record.vision.logits, vision)
        assert_logits(record.answer.ids, record.answer.logits, alone.answer_logits)
        assert record.text_ids[record.answer_positions].tolist() == alone.answer_ids.tolist()
        assert np.isneginf(record.vision.tail_logsumexp).all()
        if row["images"]:
            cosine = torch.nn.functional.cosine_similarity(alone.text[:, None], torch.cat(alone.vision)[None], dim=2)
            np.testing.assert_allclose(record.affinity, cosine.numpy(), atol=2e-6)
        else:
            assert record.affinity.shape == (len(record.text_ids), 0)


def assert_logits(ids: np.ndarray, logits: np.ndarray, expected: torch.Tensor) -> None:
    """All V logits, in any order."""
    dense_logits = np.zeros(expected.shape)
    np.put_along_axis(dense_logits, ids.astype(np.int64), logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(dense_logits, expected.numpy(), atol=3e-5)
    assert (np.diff(logits, axis=1) <= 0).all()


def test_padding_rows_of_the_lm_head_are_cut(teacher_path, data_path):
    record = teacher(teacher_path).capture(Dataset(str(data_path)), [0])[0].record
    assert record.vision.ids.max() == V - 1
    assert record.vision.ids.shape[1] == V


def test_a_cut_record_has_the_tail_of_the_rest(teacher_path, data_path):
    whole = teacher(teacher_path).capture(Dataset(str(data_path)), [1])[0].record
    cut = teacher(teacher_path, top_k=5).capture(Dataset(str(data_path)), [1])[0].record
    assert (cut.vision.ids == whole.vision.ids[:, :5]).all()
    rest = torch.from_numpy(whole.vision.logits[:, 5:]).double()
    np.testing.assert_allclose(cut.vision.tail_logsumexp, rest.logsumexp(1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(cut.vision.tail_mean, rest.mean(1).numpy(), rtol=1e-4, atol=1e-5)


def test_one_bad_row_costs_no_other(teacher_path, tmp_path):
    rows = tiny.rows()[:4]
    rows[1]["images"] = [b"broken", tiny.png(3)]
    rows[2]["messages"] = rows[2]["messages"][:1]
    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet", rows)))
    good = Dataset(str(tiny.write_data(tmp_path / "good.parquet", [rows[0], rows[3]])))
    found = teacher(teacher_path, batch_tokens=1).capture(dataset, range(4))
    alone = teacher(teacher_path, batch_tokens=1).capture(good, range(2))
    assert [result.reason for result in found] == ["", "image-broken", "no-answer", ""]
    assert [result.hint.row for result in found] == [0, 1, 2, 3]
    assert [result.hint.id for result in found] == ["one", "two", "text", "one"]
    for one, other in zip((found[0], found[3]), alone, strict=True):
        assert one.key == other.key
        assert (one.record.vision.logits == other.record.vision.logits).all()


def test_logits_that_are_not_finite_are_skipped(teacher_path, data_path):
    broken = teacher(teacher_path)
    with torch.no_grad():
        broken.vlm.model.lm_head.weight[5] = torch.nan
    found = broken.capture(Dataset(str(data_path)), range(6))
    assert {result.reason for result in found} == {"not-finite"}


def test_a_bfloat16_teacher(teacher_path, data_path):
    """Pixels come in float32 and the model runs in bfloat16; its logits are near those of float32."""
    settings = CaptureSettings(top_k=V, answer_top_k=V, logits_precision="float32", batch_tokens=200, max_length=None)
    half = Teacher(load(str(teacher_path), dtype="bfloat16"), settings).capture(Dataset(str(data_path)), range(6))
    whole = teacher(teacher_path).capture(Dataset(str(data_path)), range(6))
    for one, other in zip(half, whole, strict=True):
        dense_one, dense_other = (np.zeros((len(r.record.answer.ids), V)) for r in (one, other))
        for result, array in ((one, dense_one), (other, dense_other)):
            np.put_along_axis(array, result.record.answer.ids.astype(np.int64), result.record.answer.logits, axis=1)
        np.testing.assert_allclose(dense_one, dense_other, atol=0.5)
        assert abs(dense_one - dense_other).max() > 0


def fails_above(found: Teacher, n_tokens: int, fail=lambda: torch.empty(1 << 50)) -> list[tuple[int, int]]:
    """tiny.rows() have 26, 41, 11, 30, 45 and 24 tokens. From now on the forward pass of a batch with more padded tokens runs out of memory; the shapes that came."""
    shapes = []

    def check(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        if kwargs["input_ids"].numel() > n_tokens:
            fail()

    found.vlm.model.model.register_forward_pre_hook(check, with_kwargs=True)
    return shapes


def raise_gpu_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.slow
@pytest.mark.parametrize("fail", [lambda: torch.empty(1 << 50), raise_gpu_error], ids=["allocator", "gpu"])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(teacher_path, data_path, fail):
    dataset = Dataset(str(data_path))
    limited = teacher(teacher_path, batch_tokens=10_000)
    shapes = fails_above(limited, 100, fail)
    found = limited.capture(dataset, range(6))
    # Longest first: rows 4, 1, 3 | 0, 5, 2; of the first half row 4 and rows 1, 3.
    assert shapes == [(6, 45), (3, 45), (1, 45), (2, 41), (3, 26)]
    assert [result.halvings for result in found] == [1, 2, 1, 2, 2, 1]
    assert [result.reason for result in found] == [""] * 6
    for result, expected in zip(found, teacher(teacher_path).capture(dataset, range(6)), strict=True):
        assert_close(result.record, expected.record)


def test_halves_are_bit_equal_to_batches_of_the_same_rows(teacher_path, data_path):
    limited = teacher(teacher_path, batch_tokens=10_000)
    fails_above(limited, 100)
    found = limited.capture(Dataset(str(data_path)), range(6))
    for rows in ([4], [1, 3], [0, 5, 2]):
        for row, expected in zip(rows, teacher(teacher_path).capture(Dataset(str(data_path)), rows), strict=True):
            assert_equal(found[row].record, expected.record)
            assert expected.halvings == 0


def test_other_batches_stay_as_they_are_planned(teacher_path, data_path):
    limited, free = (teacher(teacher_path, batch_tokens=88) for _ in range(2))
    shapes, planned = fails_above(limited, 80), fails_above(free, 10_000)
    found, expected = (each.capture(Dataset(str(data_path)), range(6)) for each in (limited, free))
    assert planned == [(1, 45), (2, 41), (3, 26)]
    assert shapes == [(1, 45), (2, 41), (1, 41), (1, 30), (3, 26)]
    assert [result.halvings for result in found] == [0, 1, 0, 1, 0, 0]
    for row in (4, 0, 5, 2):
        assert_equal(found[row].record, expected[row].record)


@pytest.mark.slow
def test_a_sample_that_does_not_fit_alone_is_skipped_with_its_size(teacher_path, data_path):
    limited = teacher(teacher_path, batch_tokens=10_000)
    fails_above(limited, 40)
    found = limited.capture(Dataset(str(data_path)), range(6))
    assert [result.reason for result in found] == ["", "out-of-memory", "", "", "out-of-memory", ""]
    assert found[4].detail.startswith("45 tokens (32 of vision) do not fit the device's memory even alone; ")
    assert found[4].key == Dataset(str(data_path)).sample(4).key
    assert [result.halvings for result in found] == [2, 3, 3, 3, 2, 3]
    alone = limited.capture(Dataset(str(data_path)), [4])[0]
    assert (alone.reason, alone.halvings, alone.record) == ("out-of-memory", 0, None)


def test_logits_that_do_not_fit_halve_the_batch_too(teacher_path, data_path):
    """The head comes after the pass, and some of the batch's records are finished by then."""
    limited = teacher(teacher_path, batch_tokens=10_000)
    expected = limited.capture(Dataset(str(data_path)), range(6))
    calls = []

    def once(module, args):
        calls.append(args[0].shape)
        if len(calls) == 4:
            torch.empty(1 << 50)

    limited.vlm.model.lm_head.register_forward_pre_hook(once)
    found = limited.capture(Dataset(str(data_path)), range(6))
    assert [result.halvings for result in found] == [1] * 6
    for result, other in zip(found, expected, strict=True):
        assert_close(result.record, other.record)


def test_rows_that_are_skipped_for_another_reason_keep_their_halvings(teacher_path, data_path):
    limited = teacher(teacher_path, batch_tokens=10_000)
    fails_above(limited, 200)
    with torch.no_grad():
        limited.vlm.model.get_input_embeddings().weight[tiny.VOCABULARY.index("blue")] = torch.nan
    found = limited.capture(Dataset(str(data_path)), range(6))
    assert [result.reason for result in found] == ["", "", "not-finite", "", "", "not-finite"]
    assert [result.halvings for result in found] == [1] * 6


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("a defect")])
def test_any_other_error_ends_the_job(teacher_path, data_path, error):
    broken = teacher(teacher_path)
    shapes = fails_above(broken, 0, lambda: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match=str(error)):
        broken.capture(Dataset(str(data_path)), range(6))
    assert len(shapes) == 1, "not tried again"


@pytest.mark.slow
def test_nothing_of_the_failed_batch_is_there_when_it_is_tried_again(teacher_path, data_path):
    """Its inputs, and what the first layers made of them, in the vision tower and in the language model."""
    limited = teacher(teacher_path, batch_tokens=10_000)
    model, seen, left = limited.vlm.model.model, [], []
    layers = [*model.vision_tower.encoder.layers, *model.language_model.layers]

    def begin(module, args, kwargs):
        left.append(sum(ref() is not None for ref in seen))
        seen.extend(weakref.ref(tensor) for tensor in kwargs.values() if isinstance(tensor, torch.Tensor))

    def note(module, args, output):
        seen.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    def last(module, args):
        if args[0].shape[0] > 1:
            torch.empty(1 << 50)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(note)
    layers[-1].register_forward_pre_hook(last)
    found = limited.capture(Dataset(str(data_path)), range(6))
    assert {result.reason for result in found} == {""}
    assert len(left) == 11, "one batch, two halves, four quarters, and the halves of two of these"
    assert left == [0] * 11
    assert len(seen) > 50


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_a_row_that_cannot_be_encoded_in_memory_costs_no_other(teacher_path, data_path, monkeypatch, error):
    dataset = Dataset(str(data_path))
    found = teacher(teacher_path, batch_tokens=1)
    decode, seen = encode.decode_image, []

    def third(data):
        seen.append(data)
        if len(seen) == 3:
            raise error
        return decode(data)

    monkeypatch.setattr(encode, "decode_image", third)
    captured = found.capture(dataset, range(6))
    monkeypatch.undo()
    assert [result.reason for result in captured] == ["", "out-of-memory", "", "", "", ""]
    assert "does not fit this machine's main memory" in captured[1].detail
    assert captured[1].key == dataset.sample(1).key
    for row, expected in zip((0, 2, 3, 4, 5), found.capture(dataset, (0, 2, 3, 4, 5)), strict=True):
        assert_equal(captured[row].record, expected.record)


def test_the_first_usable_row_is_one_that_fits(teacher_path, data_path, monkeypatch):
    found = teacher(teacher_path)

    def full(data):
        raise MemoryError

    monkeypatch.setattr(encode, "decode_image", full)
    assert found.first_usable(Dataset(str(data_path)), range(6)).n_vision == 0


def test_a_model_that_inserts_tokens_of_its_own_is_refused(teacher_path, data_path):
    """Positions would refer to other tokens, and no other check would notice."""
    found = teacher(teacher_path)

    def longer(module, args, output):
        output.last_hidden_state = torch.nn.functional.pad(output.last_hidden_state, (0, 0, 0, 1))

    found.vlm.model.model.register_forward_hook(longer)
    with pytest.raises(ModelError, match="expands images itself"):
        found.capture(Dataset(str(data_path)), range(6))


def assert_equal(record, expected) -> None:
    for name, value in array_fields(expected).items():
        assert np.array_equal(array_fields(record)[name], value), name
    assert (record.key, record.images) == (expected.key, expected.images)


def assert_close(record, expected) -> None:
    """All V logits of each token, and the affinities; ids of nearly equal logits may be in another order."""
    for kind in ("vision", "answer"):
        found, wanted = getattr(record, kind), getattr(expected, kind)
        everything = np.zeros((len(wanted), V))
        np.put_along_axis(everything, wanted.ids.astype(np.int64), wanted.logits.astype(np.float64), axis=1)
        assert_logits(found.ids, found.logits, torch.from_numpy(everything))
    np.testing.assert_allclose(record.affinity, expected.affinity, atol=2e-6)
    assert np.array_equal(record.text_ids, expected.text_ids)


def test_the_index_has_what_each_row_says_and_the_manifest_the_template(teacher_path, tmp_path):
    """Of skipped rows as well, as far as they say anything."""
    rows = tiny.rows()
    rows[1]["images"][0] = b"broken"
    rows[2]["messages"] = []
    rows[3]["images"] = []
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    cache = Cache.open(tiny.make_cache(teacher_path, data, tmp_path / "cache"))
    texts = list(Dataset(str(data)).text_hashes())
    assert cache.knows_texts
    assert (
        cache.samples["text_sha256"].to_pylist()
        == [texts[row] for row in cache.sample_rows]
        == [texts[n] for n in (0, 4, 5)]
    )
    assert cache.skipped["text_sha256"].to_pylist() == [texts[1], "", texts[3]]
    assert cache.manifest.tokenizer.chat_template == tiny.TEMPLATE
