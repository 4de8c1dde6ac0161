"""A tokenizer whose ids have gaps: V is its largest id + 1, and caches from before emkd knew this go on as they were."""

import json

import pytest
import torch

from emkd.errors import DataMismatchError
from emkd.inspection.compare.against_teacher import compare_with_teacher
from emkd.inspection.compare.live_teacher import LiveSettings
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache, create_cache
from emkd.storage.index.commit import missing_shards
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.conflicts import conflicts
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.open import open_files
from emkd.trainer import TrainSettings, load_recipe, train_student, with_flags
from emkd.vlm import load
from tests import tiny

V, COUNTED = 56, 26


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.save_gapped(tmp_path_factory.mktemp("gapped") / "teacher", seed=1, hidden=32)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save_gapped(tmp_path_factory.mktemp("gapped") / "student", seed=2, hidden=24)


def train(student, data, cache, output):
    flags = {"training.max_steps": 2, "training.per_device_train_batch_size": 3, "losses.beta": 0.25}
    recipe = with_flags(load_recipe(None), flags)
    return train_student(
        TrainSettings(student=str(student), data=str(data), output=output, cache=str(cache), recipe=recipe)
    )


@pytest.mark.slow
@pytest.mark.parametrize("stored", [{}, {"top_k": 5, "answer_top_k": 5}, {"logit_error": 0.8, "top_k": None}])
def test_no_id_is_left_out(teacher, student, data_path, tmp_path, stored):
    cache = tiny.make_cache(teacher, data_path, tmp_path / "cache", **stored)
    opened, vlm = Cache.open(cache), load(str(teacher))
    assert opened.manifest.vocabulary_size == V
    encoder = Encoder(vlm.processor, vlm.image_token_id)
    for number in range(opened.n_samples):
        encoded = encoder(Dataset(str(data_path)).sample(int(opened.sample_rows[number])))
        with torch.no_grad():
            logits = vlm.model(**encoded.inputs).logits[0, encoded.predicting_positions]
        k = opened.manifest.answer_top_k
        expected = logits[:, :V].topk(k).values
        found = torch.from_numpy(opened.record(number).answer.logits).float()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
        assert (
            encoded.text_ids[encoded.answer_positions].tolist()
            == opened.record(number).text_ids[opened.record(number).answer_positions].tolist()
        )
    assert train(student, data_path, cache, tmp_path / "out")["train_loss"] > 0


@pytest.fixture
def older_cache(teacher, data_path, tmp_path):
    """As emkd made it when it took the number of ids for V; its second shard is missing."""
    settings = JobSettings(
        teacher=str(teacher), data=str(data_path), cache=str(tmp_path / "cache"), gpus_per_worker=0,
        logit_error="none", top_k=5, answer_top_k=5, precision="float32", rows_per_shard=3,
    )  # fmt: skip
    run, tokenizer = job_manifest(settings, Dataset(str(data_path)))
    counted = run.tokenizer.model_copy(update={"n_tokens": COUNTED})
    older = run.model_copy(update={"tokenizer": counted}).without("config")
    create_cache(settings.cache, older, tokenizer)
    CaptureWorker(settings, older).capture_shard(0)
    return settings


def test_an_older_cache_reads_and_goes_on_as_it_was(older_cache, teacher, student, data_path, tmp_path):
    files = open_files(older_cache.cache)
    existing = read_manifest(files)
    run, tokenizer = job_manifest(older_cache, Dataset(str(data_path)), existing.format_version, existing)
    assert run.vocabulary_size == COUNTED
    assert conflicts(existing, run) == []
    assert create_cache(older_cache.cache, run, tokenizer)
    worker = CaptureWorker(older_cache, existing)
    for shard in missing_shards(files, existing):
        worker.capture_shard(shard)
    seal(files)
    opened = Cache.open(older_cache.cache)
    assert max(int(opened.record(n).answer.ids.max()) for n in range(opened.n_samples)) < COUNTED
    live = LiveSettings(against_teacher=str(teacher), data=str(data_path))
    assert compare_with_teacher(older_cache.cache, live, print)["agrees"]
    with pytest.raises(DataMismatchError, match="its answer has the id 55, and the cache has logits of ids below 26"):
        train(student, data_path, older_cache.cache, tmp_path / "out")


def test_a_new_cache_of_the_same_tokenizer_keeps_its_v(teacher, data_path, tmp_path):
    cache = tiny.make_cache(teacher, data_path, tmp_path / "cache", top_k=5, answer_top_k=5)
    settings = JobSettings(teacher=str(teacher), data=str(data_path), cache=str(cache), logit_error="none")
    existing = read_manifest(open_files(settings.cache))
    run, _ = job_manifest(settings, Dataset(str(data_path)), 4, existing)
    assert json.loads(run.to_bytes())["tokenizer"]["n_tokens"] == V
