"""What a worker checks of the teacher that it loaded, before the first shard."""

from dataclasses import replace

import pytest

from emkd.errors import ModelError
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples import Dataset
from emkd.vlm import load
from tests import tiny


@pytest.fixture
def worker(teacher_path, data_path, tmp_path):
    def make(**tokenizer):
        settings = JobSettings(
            teacher=str(teacher_path), data=str(data_path), cache=str(tmp_path / "c"), gpus_per_worker=0,
            logit_error="none",
        )  # fmt: skip
        manifest, _ = job_manifest(settings, Dataset(str(data_path)))
        tokenizer = manifest.tokenizer.model_copy(update=tokenizer)
        return CaptureWorker(settings, manifest.model_copy(update={"tokenizer": tokenizer}))

    return make


def test_preflight_reports_and_leaves_nothing(worker, tmp_path):
    seen = worker().preflight([0, 2, 5])
    assert (seen.n_rows, seen.skipped, seen.end_token, seen.vision_tokens) == (3, (), True, 32)
    assert seen.sizes.per_row > 0
    assert seen.sizes.per_shard > 0
    assert not (tmp_path / "c").exists()


def test_other_rows_of_the_lm_head_than_promised(worker):
    with pytest.raises(ModelError, match="its LM head has 64 rows, its config says 65"):
        worker(lm_head_rows=65).preflight([0])


@pytest.mark.parametrize("attention", [None, "eager"])
def test_the_teacher_is_loaded_as_the_manifest_says(teacher_path, data_path, tmp_path, monkeypatch, attention):
    """Independent of this worker's settings: the numbers depend on both."""
    settings = JobSettings(
        teacher=str(teacher_path), data=str(data_path), cache=str(tmp_path / "c"), gpus_per_worker=0,
        dtype="bfloat16", attn_implementation=attention, top_k=3, max_length=40,
    )  # fmt: skip
    manifest, _ = job_manifest(settings, Dataset(str(data_path)))
    other = replace(settings, dtype="float32", attn_implementation="sdpa", top_k=5, max_length=50)
    seen = {}
    monkeypatch.setattr(
        "emkd.pipeline.worker.load", lambda name, **options: seen.update(options) or load(name, **options)
    )
    teacher, _ = CaptureWorker(other, manifest)._loaded()
    assert (seen["dtype"], seen["attn_implementation"]) == ("bfloat16", attention)
    assert (teacher.settings.top_k, teacher.settings.max_length) == (3, 40)


def test_other_weights_by_the_same_name(worker, teacher_path, tmp_path):
    made = worker()
    other = tiny.save_model(tmp_path / "other", seed=9, hidden=32)
    with pytest.raises(ModelError, match="the weights on this machine differ"):
        made._check(load(str(other)))
