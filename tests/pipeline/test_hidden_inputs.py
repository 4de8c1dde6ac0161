"""The same command, the same cache: nothing that nobody named changes what the teacher reads or computes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import pytest
import torch

from emkd.errors import CacheConflictError, ModelError, TokenizerMismatchError, UsageError
from emkd.inspection.compare.against_teacher import compare_with_teacher
from emkd.inspection.compare.live_teacher import LiveSettings
from emkd.pipeline import cache_teacher
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples import Dataset
from emkd.storage.cache import Cache, create_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.conflicts import conflicts
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.open import open_files
from emkd.trainer import TrainSettings, load_recipe, train_student, with_flags
from tests import tiny

DAYS = ("2026-11-29", "2026-11-30", "2026-12-01")
DATED = "{{ strftime_now('%Y-%m-%d') + '\n' }}" + tiny.TEMPLATE


@pytest.fixture
def day(monkeypatch):
    """Set the date of this machine, for emkd and for transformers' own `strftime_now`."""

    def set_to(date: str) -> None:
        class Fixed(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.fromisoformat(date + "T12:00:00")

        monkeypatch.setattr("emkd.clock.datetime", Fixed)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)

    return set_to


def dated(folder, seed, hidden):
    """A checkpoint whose template writes the date, of which its tokenizer has a token for each of DAYS."""
    tiny.save_model(folder, seed=seed, hidden=hidden, words=(*tiny.VOCABULARY, *DAYS))
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


@pytest.fixture(scope="module")
def dated_teacher(tmp_path_factory):
    return dated(tmp_path_factory.mktemp("dated") / "teacher", 1, 32)


@pytest.fixture(scope="module")
def dated_student(tmp_path_factory):
    return dated(tmp_path_factory.mktemp("dated") / "student", 2, 24)


def settings_of(teacher, data, cache, **chosen) -> JobSettings:
    return JobSettings(
        teacher=str(teacher), data=str(data), cache=str(cache), gpus_per_worker=0, logit_error="none",
        rows_per_shard=2, **chosen,
    )  # fmt: skip


def first_words(cache) -> set[str]:
    """The first word of each cached row: the date."""
    words = (*tiny.VOCABULARY, *DAYS)
    opened = Cache.open(cache)
    return {words[opened.record(n).text_ids[0]] for n in range(opened.n_samples)}


def train(student, data, output, cache=None, **options):
    flags = {"training.max_steps": 2, "training.per_device_train_batch_size": 2, "training.save_steps": 1}
    if cache is None:
        flags |= {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0}
    settings = TrainSettings(
        student=str(student), data=str(data), output=output, cache=None if cache is None else str(cache),
        recipe=with_flags(load_recipe(None), flags), **options,
    )  # fmt: skip
    return train_student(settings)


def test_a_cache_of_today_is_trained_and_compared_tomorrow(dated_teacher, dated_student, data_path, tmp_path, day):
    day(DAYS[0])
    cache = tiny.make_cache(dated_teacher, data_path, tmp_path / "cache")
    assert Cache.open(cache).manifest.clock == DAYS[0]
    day(DAYS[1])
    train(dated_student, data_path, tmp_path / "out", cache)
    live = LiveSettings(against_teacher=str(dated_teacher), data=str(data_path))
    assert compare_with_teacher(str(cache), live, print)["agrees"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == DATED, "the student is asked on other days"


def test_a_job_over_midnight_writes_one_date(dated_teacher, data_path, tmp_path, day):
    day(DAYS[0])
    settings = settings_of(dated_teacher, data_path, tmp_path / "cache")
    manifest, tokenizer = job_manifest(settings, Dataset(str(data_path)))
    files = create_cache(settings.cache, manifest, tokenizer)
    worker = CaptureWorker(settings, manifest)
    worker.capture_shard(0)
    day(DAYS[1])
    worker.capture_shard(1)
    day(DAYS[2])  # the same command, after a kill
    existing = read_manifest(files)
    run, _ = job_manifest(settings, Dataset(str(data_path)), existing.format_version, existing)
    assert conflicts(existing, run) == []
    CaptureWorker(settings, existing).capture_shard(2)
    seal(files)
    assert first_words(tmp_path / "cache") == {DAYS[0]}


def test_a_job_that_lost_the_race_writes_the_date_of_the_other(dated_teacher, data_path, tmp_path, day):
    settings = settings_of(dated_teacher, data_path, tmp_path / "cache")
    day(DAYS[0])
    first, tokenizer = job_manifest(settings, Dataset(str(data_path)))
    day(DAYS[1])
    second, _ = job_manifest(settings, Dataset(str(data_path)))
    worker = CaptureWorker(settings, second)
    worker.preflight([0])  # before there is a cache
    files = create_cache(settings.cache, first, tokenizer)
    assert create_cache(settings.cache, second, tokenizer)
    for shard in range(3):
        worker.capture_shard(shard)
    seal(files)
    assert first_words(tmp_path / "cache") == {DAYS[0]}


def test_the_date_can_be_named(dated_teacher, data_path, tmp_path, day):
    day(DAYS[1])
    cache = tiny.make_cache(dated_teacher, data_path, tmp_path / "cache", clock=DAYS[2])
    assert first_words(cache) == {DAYS[2]}


@pytest.fixture
def undated_cache(dated_teacher, data_path, tmp_path, day):
    """As an emkd made it that did not keep the date: on the first of DAYS, of which the manifest says nothing."""
    day(DAYS[0])
    made = tiny.make_cache(dated_teacher, data_path, tmp_path / "made")
    files = open_files(tmp_path / "cache")
    manifest = read_manifest(open_files(made)).without("clock", "config")
    create_cache(files.root, manifest, (made / "tokenizer.json").read_bytes())
    worker = CaptureWorker(settings_of(dated_teacher, data_path, files.root, clock=DAYS[0]), manifest)
    for shard in manifest.shards:
        worker.capture_shard(shard)
    seal(files)
    assert b"clock" not in (files.root / "manifest.json").read_bytes()
    day(DAYS[1])
    return files.root


def test_an_older_cache_whose_date_is_not_known(undated_cache, dated_student, dated_teacher, data_path, tmp_path):
    """It is refused, unless the user names the day; a wrong day is found out."""
    with pytest.raises(UsageError, match="made before emkd kept the date.*Name the day on which it was made"):
        train(dated_student, data_path, tmp_path / "refused", undated_cache)
    with pytest.raises(TokenizerMismatchError, match=f"student '{DAYS[2]}' .*, teacher '{DAYS[0]}'"):
        train(dated_student, data_path, tmp_path / "wrong", undated_cache, clock=DAYS[2])
    train(dated_student, data_path, tmp_path / "out", undated_cache, clock=DAYS[0])
    assert json.loads((tmp_path / "out/run.json").read_text())["clock"] == DAYS[0]
    live = LiveSettings(against_teacher=str(dated_teacher), data=str(data_path), samples=1)
    with pytest.raises(UsageError, match="made before emkd kept the date"):
        compare_with_teacher(str(undated_cache), live, print)
    assert compare_with_teacher(str(undated_cache), replace(live, clock=DAYS[0]), print)["agrees"]
    manifest = read_manifest(open_files(undated_cache))
    settings = settings_of(dated_teacher, data_path, undated_cache)
    with pytest.raises(UsageError, match="made before emkd kept the date"):
        CaptureWorker(settings, manifest).capture_shard(0)
    with pytest.raises(UsageError, match="made before emkd kept the date"):
        cache_teacher(settings)


def test_a_run_without_a_cache_keeps_its_first_day(dated_student, data_path, tmp_path, day):
    day(DAYS[0])
    train(dated_student, data_path, tmp_path / "out")
    assert json.loads((tmp_path / "out/run.json").read_text())["clock"] == DAYS[0]
    day(DAYS[1])
    train(dated_student, data_path, tmp_path / "out", resume=True)
    with pytest.raises(UsageError, match=f"clock was {DAYS[0]} and is {DAYS[2]}"):
        train(dated_student, data_path, tmp_path / "out", resume=True, clock=DAYS[2])


def test_a_template_that_draws_is_refused(tmp_path):
    folder = tiny.save_model(tmp_path / "m", seed=1, hidden=32)
    (folder / "chat_template.jinja").write_text("{{ ['yes', 'no'] | random }}" + tiny.TEMPLATE)
    with pytest.raises(ModelError, match="its chat template draws at random"):
        tiny.make_cache(folder, tiny.write_data(tmp_path / "rows.parquet"), tmp_path / "cache")


@pytest.fixture
def job(teacher_path, data_path, tmp_path):
    """(a copy of the teacher, the settings of its job, the manifest that a driver made)"""
    folder = shutil.copytree(teacher_path, tmp_path / "copy")
    settings = settings_of(folder, data_path, tmp_path / "cache")
    return folder, settings, job_manifest(settings, Dataset(str(data_path)))[0]


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_config_is_part_of_the_teacher(job, data_path):
    """The same weights with another config give other logits: the job does not resume, and says what differs."""
    folder, settings, manifest = job
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    again, tokenizer = job_manifest(settings, Dataset(str(data_path)))
    create_cache(settings.cache, manifest, tokenizer)
    with pytest.raises(
        CacheConflictError, match=r"teacher.config.text_config.rms_norm_eps: cache has 1e-06, this run 0.5"
    ):
        create_cache(settings.cache, again, tokenizer)
    assert conflicts(manifest.without("config"), again) == [], "a cache from before configs were kept goes on"
    with pytest.raises(ModelError, match="on this machine it has another config.json than in the cache's manifest"):
        CaptureWorker(settings, manifest).preflight([0])


def test_versions_and_paths_in_the_config_decide_nothing(job, data_path):
    folder, settings, manifest = job
    edit(folder / "config.json", transformers_version="0.0.1", _name_or_path="elsewhere", architectures=["Other"])
    assert job_manifest(settings, Dataset(str(data_path)))[0] == manifest


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        ("processor_config.json", {"image_mean": [0.4] * 3}, r"image processor \(image_mean\)"),
        ("chat_template.jinja", None, "chat template"),
        ("tokenizer.json", None, "tokenizer"),
    ],
)
def test_a_worker_whose_files_differ_from_the_drivers(job, file, changed, said):
    """Equal weights do not make an equal teacher: another machine may have other pixels, another text."""
    folder, settings, manifest = job
    text = (folder / file).read_text()
    if changed is not None:
        value = json.loads(text)
        value["image_processor"] |= changed
        text = json.dumps(value)
    else:
        text = text.replace("<end>", "<stop>") if file == "tokenizer.json" else "{# other #}" + text
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match=f"on this machine it has another {said} than in the cache's manifest"):
        CaptureWorker(settings, manifest).preflight([0])


def test_another_package_that_prepares_the_images(job):
    """Without torchvision, transformers takes a processor that rounds pixels in another way."""
    _, settings, manifest = job
    pixels = manifest.image_processor.model_copy(update={"class_name": "SiglipImageProcessorPil"})
    with pytest.raises(ModelError, match=r"another kind of image processor \(SiglipImageProcessor\)"):
        CaptureWorker(settings, manifest.model_copy(update={"image_processor": pixels})).preflight([0])


@pytest.mark.slow
def test_float32_is_float32_whatever_the_environment_says(job):
    """Images of GPU clouds set this variable; on a GPU, products would have 10 bits and the manifest say float32."""
    _, settings, manifest = job
    code = (
        "import sys, torch\nfrom emkd.pipeline.worker import CaptureWorker\nfrom emkd.pipeline.settings import JobSettings\n"
        "from emkd.storage.manifest.manifest import Manifest\nbefore = torch.get_float32_matmul_precision()\n"
        "CaptureWorker(JobSettings(**eval(sys.argv[1])), Manifest.from_bytes(sys.stdin.buffer.read())).preflight([0])\n"
        "print(before, torch.get_float32_matmul_precision())"
    )
    chosen = {"teacher": settings.teacher, "data": settings.data, "cache": settings.cache, "gpus_per_worker": 0}
    done = subprocess.run(
        [sys.executable, "-c", code, repr(chosen)], input=manifest.to_bytes(), capture_output=True, check=True,
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
    )  # fmt: skip
    assert done.stdout.decode().split()[-2:] == ["high", "highest"]


def test_training_in_float32_unless_the_recipe_says_otherwise(student_path, data_path, cache_path, tmp_path):
    torch.set_float32_matmul_precision("high")
    try:
        train(student_path, data_path, tmp_path / "out", cache_path)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
