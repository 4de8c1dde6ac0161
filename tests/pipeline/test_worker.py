"""What a worker checks of the teacher that it loaded, before the first shard."""

import pytest

from emkd.errors import ModelError
from emkd.pipeline.manifest_of import identify
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples import Dataset
from emkd.vlm import load
from tests import tiny


@pytest.fixture
def worker(teacher_path, data_path, tmp_path):
    def make(**tokenizer):
        settings = JobSettings(
            teacher=str(teacher_path), data=str(data_path), cache=str(tmp_path / "c"), gpus_per_worker=0
        )
        manifest, _ = identify(settings, Dataset(str(data_path)))
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


def test_other_weights_by_the_same_name(worker, teacher_path, tmp_path):
    made = worker()
    other = tiny.save_model(tmp_path / "other", seed=9, hidden=32)
    with pytest.raises(ModelError, match="other weights by that name"):
        made._check(load(str(other)))
