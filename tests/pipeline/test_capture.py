"""The teacher's pass against the model called by itself, one sample at a time."""

import numpy as np
import pytest
import torch

from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.samples import Dataset
from emkd.vlm import load
from tests import tiny
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
        assert_logits(record.vision_ids, record.vision_logits, vision)
        assert_logits(record.answer_ids, record.answer_logits, alone.answer_logits)
        assert record.text_ids[record.answer_positions].tolist() == alone.answer_ids.tolist()
        assert np.isneginf(record.vision_tail_logsumexp).all()
        if row["images"]:
            cosine = torch.nn.functional.cosine_similarity(alone.text[:, None], torch.cat(alone.vision)[None], dim=2)
            np.testing.assert_allclose(record.affinity, cosine.numpy(), atol=2e-6)
        else:
            assert record.affinity.shape == (len(record.text_ids), 0)


def assert_logits(ids: np.ndarray, logits: np.ndarray, expected: torch.Tensor) -> None:
    """All V of them, wherever they stand."""
    dense_logits = np.zeros(expected.shape)
    np.put_along_axis(dense_logits, ids.astype(np.int64), logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(dense_logits, expected.numpy(), atol=3e-5)
    assert (np.diff(logits, axis=1) <= 0).all()


def test_padding_rows_of_the_lm_head_are_cut(teacher_path, data_path):
    record = teacher(teacher_path).capture(Dataset(str(data_path)), [0])[0].record
    assert record.vision_ids.max() == V - 1
    assert record.vision_ids.shape[1] == V


def test_a_cut_record_has_the_tail_of_the_rest(teacher_path, data_path):
    whole = teacher(teacher_path).capture(Dataset(str(data_path)), [1])[0].record
    cut = teacher(teacher_path, top_k=5).capture(Dataset(str(data_path)), [1])[0].record
    assert (cut.vision_ids == whole.vision_ids[:, :5]).all()
    rest = torch.from_numpy(whole.vision_logits[:, 5:]).double()
    np.testing.assert_allclose(cut.vision_tail_logsumexp, rest.logsumexp(1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(cut.vision_tail_mean, rest.mean(1).numpy(), rtol=1e-4, atol=1e-5)


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
        assert (one.record.vision_logits == other.record.vision_logits).all()


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
        dense_one, dense_other = (np.zeros((len(r.record.answer_ids), V)) for r in (one, other))
        for result, array in ((one, dense_one), (other, dense_other)):
            np.put_along_axis(array, result.record.answer_ids.astype(np.int64), result.record.answer_logits, axis=1)
        np.testing.assert_allclose(dense_one, dense_other, atol=0.5)
        assert abs(dense_one - dense_other).max() > 0
