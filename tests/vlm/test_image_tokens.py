"""A processor that does not count the tokens of an image as the model does: told with the settings, before any row."""

import json

import pytest

from emkd.errors import ModelError
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples import Dataset
from emkd.trainer import TrainSettings, load_recipe, train_student, with_flags
from emkd.vlm import load
from tests import tiny


@pytest.fixture
def with_settings(tmp_path):
    def made(**changes):
        path = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
        file = path / "processor_config.json"
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return path

    return made


def worker(path, data, folder) -> CaptureWorker:
    settings = JobSettings(teacher=str(path), data=str(data), cache=str(folder), gpus_per_worker=0, logit_error="none")
    return CaptureWorker(settings, job_manifest(settings, Dataset(str(data)))[0])


def test_no_patch_size(with_settings, data_path, tmp_path):
    path = with_settings(patch_size=None)
    said = r'its LlavaProcessor has no patch_size, .* set it in processor_config.json \(its vision tower has 5: "patch_size": 5\)'
    with pytest.raises(ModelError, match=said):
        load(str(path))
    with pytest.raises(ModelError, match=said):  # in the driver, before Ray starts
        worker(path, data_path, tmp_path / "c")


@pytest.mark.parametrize(("changes", "counted"), [({"num_additional_image_tokens": 1}, 17), ({"patch_size": 10}, 4)])
def test_one_token_too_many(with_settings, data_path, tmp_path, changes, counted):
    path = with_settings(**changes)
    said = (
        rf"LlavaForConditionalGeneration: its processor writes {counted} placeholders for the images of a batch, "
        r"which is not the number of their vision tokens. Settings of its processor_config.json \(patch_size, vision_feature_select_strategy, .* of its "
        r"config.json \(vision_config.patch_size 5, vision_config.image_size 20, vision_feature_select_strategy 'full'\)"
    )
    with pytest.raises(ModelError, match=said):
        worker(path, data_path, tmp_path / "c").preflight([0])
    flags = {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0}
    settings = TrainSettings(
        student=str(path), data=str(data_path), output=tmp_path / "out", recipe=with_flags(load_recipe(None), flags | {
            "training.per_device_train_batch_size": 1}),
    )  # fmt: skip
    with pytest.raises(ModelError, match="which is not the number of their vision tokens"):
        train_student(settings)
