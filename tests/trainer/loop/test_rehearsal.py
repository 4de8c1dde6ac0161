"""What a run needs at its end or in its first step is tried before: small inputs that once ended in a traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from emkd.errors import EmkdError, ModelError, UsageError
from emkd.temporary import too_long_for_loaders, too_long_for_ray
from emkd.trainer import TrainSettings, make_recipe, train_student
from emkd.trainer.loop import rehearsal
from emkd.vlm.loading import load_model

pytestmark = pytest.mark.slow


@pytest.fixture
def run(student_path, data_path, cache_path, tmp_path):
    """Trains two steps; returns the output folder."""

    def train(student=student_path, output="out", losses=None, workers=1, eval_data=None, **training):
        given = {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            **training,
        }
        recipe = make_recipe({"student": {"vision_pool": 2}, "losses": losses or {}, "training": given}, "recipe")
        train_student(
            TrainSettings(
                student=str(student), data=str(data_path), cache=str(cache_path), output=tmp_path / output,
                recipe=recipe, workers=workers, eval_data=eval_data,
            )
        )  # fmt: skip
        return tmp_path / output

    return train


@pytest.fixture
def changed(student_path, tmp_path):
    """A copy of the student with other content in one of its JSON files."""

    def change(name, content):
        folder = tmp_path / "changed"
        shutil.copytree(student_path, folder, dirs_exist_ok=True)
        found = json.loads((folder / name).read_text())
        content(found)
        (folder / name).write_text(json.dumps(found))
        return folder

    return change


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"dataloader_persistent_workers": True}, r"the loader of batches .*training.dataloader_persistent_workers True: .*num_workers > 0"),
        ({"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "thread"}, r"training.dataloader_multiprocessing_context 'thread': .*Correct these fields"),
        ({"dataloader_prefetch_factor": 4}, r"the recipe's training section: .*dataloader_prefetch_factor can only be set .*num_workers > 0"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"the schedule of the learning rate .*training.lr_scheduler_type 'cosine_with_min_lr': .*min_lr"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 1e-6}}, r"training.lr_scheduler_kwargs \{'min_lr': 1e-06\}: TypeError"),
        ({"use_liger_kernel": True}, r"training.use_liger_kernel true: .*pip install liger-kernel"),
        ({"seed": 4294967296}, r"training.seed: must be at most 4294967295"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False, "use_rentrant": False}}, r"activation_checkpointing_kwargs: 'use_rentrant' is not one of its keys; did you mean 'use_reentrant'"),
        ({"enable_jit_checkpoint": True}, r"training.enable_jit_checkpoint cannot be set: training.save_on_signal"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_work_is_named_before_a_step_is_done(run, tmp_path, capsys, training, message):
    if training.get("use_liger_kernel") and rehearsal.is_liger_kernel_available():
        pytest.skip("liger-kernel is installed")
    with pytest.raises(UsageError, match=message):
        run(**training)
    assert "step 1/2" not in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_generation_config_that_cannot_be_saved_is_repaired_and_told(run, changed, capsys):
    """Hours of training ended at the first save."""
    path = "generation_config.json"
    student = changed(path, lambda found: found.update(temperature=0.9, top_p=0.6, do_sample=False, max_new_tokens=7))
    output = run(student)
    said = capsys.readouterr().err
    assert f"{student}/{path}: temperature 0.9, top_p 0.6 have no effect without do_sample: true" in said
    saved = json.loads((output / path).read_text())
    assert saved["max_new_tokens"] == 7
    assert not {"temperature", "top_p"} & saved.keys()


def test_settings_of_sampling_that_have_an_effect_stay(run, changed, capsys):
    student = changed("generation_config.json", lambda found: found.update(temperature=0.9, do_sample=True))
    assert json.loads((run(student) / "generation_config.json").read_text())["temperature"] == 0.9
    assert "have no effect" not in capsys.readouterr().err


def test_a_contradiction_that_even_loading_refuses(run, changed, tmp_path):
    student = changed("generation_config.json", lambda found: found.update(num_beams=1, num_return_sequences=3))
    with pytest.raises(ModelError, match=r"cannot be loaded: .*num_return_sequences"):
        run(student)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_processor_without_patch_size(run, changed):
    student = changed("processor_config.json", lambda found: found.update(patch_size=None))
    with pytest.raises(ModelError, match=r'has no patch_size.*set it in processor_config.json .*"patch_size": 5'):
        run(student)


def test_a_processor_that_counts_one_token_too_many(run, changed):
    student = changed("processor_config.json", lambda found: found.update(num_additional_image_tokens=1))
    message = r"its processor writes \d+ placeholders .*num_additional_image_tokens.*vision_config.patch_size 5"
    with pytest.raises(ModelError, match=message):
        run(student, losses={"alpha": 1.0, "beta": 0.0, "gamma": 0.0})


def test_too_little_room_for_a_checkpoint(run, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UsageError, match=r"--output .*: a checkpoint takes about .* kB, and 1 kB are free"):
        run()


def test_memory_that_does_not_suffice_for_the_first_step(run, monkeypatch):
    """As a GPU raises it."""
    from emkd.trainer.loop.trainer import DistillationTrainer

    def fail(self, *given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(DistillationTrainer, "training_step", fail)
    with pytest.raises(UsageError, match="does not fit into the memory of cpu: .*per_device_train_batch_size"):
        run()


def test_an_error_after_the_first_step_is_not_blamed_on_the_recipe(run, monkeypatch):
    from emkd.trainer.loop.trainer import DistillationTrainer

    plain = DistillationTrainer.training_step

    def fail(self, *given, **more):
        if self.state.global_step == 1:
            raise ValueError("later")
        return plain(self, *given, **more)

    monkeypatch.setattr(DistillationTrainer, "training_step", fail)
    with pytest.raises(ValueError, match="^later$") as raised:
        run()
    assert not isinstance(raised.value, EmkdError)


def test_the_rehearsal_changes_no_weight(run, monkeypatch):
    monkeypatch.setattr("emkd.trainer.run.rehearse", lambda *_: None)
    without = load_model(run(output="without"), dtype="auto").state_dict()
    monkeypatch.undo()
    found = load_model(run(output="with"), dtype="auto").state_dict()
    assert all(torch.equal(found[name], value) for name, value in without.items())


def test_several_workers_are_checked_before_ray_starts(run, data_path, monkeypatch):
    import ray

    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "eval_steps": 3, "save_steps": 4}
    with pytest.raises(UsageError, match="the recipe's training section: .*multiple"):
        run(workers=2, eval_data=str(data_path), **best)
    with pytest.raises(UsageError, match="need data to evaluate on: set --eval-data"):
        run(workers=2, **best)
    with pytest.raises(UsageError, match="losses.top_k 99: the cache stores"):
        run(workers=2, losses={"top_k": 99})


def test_a_folder_of_temporary_files_with_too_long_a_path(student_path, data_path, cache_path, tmp_path):
    """92 characters: Ray's and the loader workers' sockets do not fit."""
    long = tmp_path / ("x" * (92 - len(str(tmp_path)) - 1) if len(str(tmp_path)) < 90 else "x")
    long.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"training": {"max_steps": 1, "dataloader_num_workers": 1}}))
    command = [sys.executable, "-m", "emkd.cli", "train-student", "--student", student_path, "--data", data_path]
    for more in (["--workers", "2"], []):
        found = subprocess.run(
            [*map(str, command), "--cache", str(cache_path), "--output", str(tmp_path / "o"), "--recipe", str(recipe), *more],
            env={**os.environ, "TMPDIR": str(long)}, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert found.returncode == 2, found.stderr
        assert "set a shorter TMPDIR" in found.stderr
        assert "Traceback" not in found.stderr
    assert not list((tmp_path / "o").glob("checkpoint-*"))


def test_a_short_path_is_short_enough(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert too_long_for_loaders() is None
    assert too_long_for_ray() is None
