"""`train_student` as a user calls it: whole runs, small models."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from emkd.agreement.text import check_same_text
from emkd.errors import (
    CacheIncompleteError,
    DataFormatError,
    DataMismatchError,
    GeometryMismatchError,
    InputNotFoundError,
    ModelError,
    OutputExistsError,
    TokenizerMismatchError,
    UsageError,
)
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer import Recipe, TrainSettings, evaluate_checkpoint, train_student, with_flags
from emkd.trainer.data.order import epoch_order
from emkd.trainer.data.samples import StudentSamples, TeacherLimits
from emkd.vlm.loading import load, load_model
from tests import tiny

pytestmark = pytest.mark.slow

BASE = with_flags(
    Recipe(),
    {
        "training.per_device_train_batch_size": 2, "training.max_steps": 4, "training.learning_rate": 1e-3,
        "training.logging_steps": 1, "student.vision_pool": 2,
    },
)  # fmt: skip


@pytest.fixture
def settings(student_path, data_path, cache_path, tmp_path):
    def make(recipe=BASE, **chosen):
        given = {
            "student": str(student_path),
            "data": str(data_path),
            "cache": str(cache_path),
            "output": tmp_path / "out",
        }
        return TrainSettings(**{**given, "recipe": recipe, **chosen})

    return make


def weights(folder):
    """By their names in memory: the names on disk may be LLaVA's older ones."""
    return load_model(folder, dtype="auto").state_dict()


def test_the_teacher_is_gone(teacher_path, student_path, data_path, tmp_path, settings):
    """A copy of the teacher makes the cache and is deleted before the student trains."""
    shutil.copytree(teacher_path, tmp_path / "teacher")
    cache = tiny.make_cache(tmp_path / "teacher", data_path, tmp_path / "cache", top_k=8, answer_top_k=8)
    shutil.rmtree(tmp_path / "teacher")
    metrics = train_student(settings(cache=str(cache)))
    assert metrics["train_loss"] > 0
    before, after = weights(student_path), weights(tmp_path / "out")
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_it_learns_from_every_loss(settings, tmp_path, capsys):
    train_student(settings(with_flags(BASE, {"training.max_steps": 40, "training.logging_steps": 5})))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step") and " sup " in line]
    first, last = (
        dict(part.rsplit(" ", 1) for part in line.split(": ", 1)[1].split(", ")) for line in (lines[0], lines[-1])
    )
    for name in ("sup", "rld", "vsd", "vlad"):
        assert float(last[name]) < float(first[name]), name


def test_what_is_saved_loads_and_generates(settings, tmp_path, data_path):
    train_student(settings())
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_pool"] == 2
    assert "alpha: 0.5" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert 0 <= evaluate_checkpoint(str(tmp_path / "out"), str(data_path))["accuracy"] <= 1
    student = StudentSamples(
        Dataset(str(data_path)), Encoder(AutoProcessor.from_pretrained(tmp_path / "out"), 2), range(6)
    )
    inputs = student[0].encoded.inputs
    said = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[2])
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3


def test_freezing(settings, student_path, tmp_path):
    train_student(settings(with_flags(BASE, {"student.freeze": ["model.vision_tower"]})))
    before, after = weights(student_path), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not {name for name in changed if "vision_tower" in name}
    with pytest.raises(UsageError, match=r"freeze 'no.such': no parameter.*language_model"):
        train_student(settings(with_flags(BASE, {"student.freeze": ["no.such"]}), output=tmp_path / "other"))


def test_plain_fine_tuning_needs_no_cache(settings, tmp_path):
    sft = {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0}
    train_student(settings(with_flags(BASE, sft), cache=None))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(UsageError, match="--cache is missing: only plain fine-tuning"):
        train_student(settings(cache=None, output=tmp_path / "other"))


def test_sft_with_and_without_a_cache_is_the_same(settings, tmp_path):
    """The cache decides the order of samples alone, and six rows in one shard have one order."""
    sft = with_flags(BASE, {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0})
    train_student(settings(sft, cache=None))
    expected = weights(tmp_path / "out")
    rows = tiny.make_cache(
        tiny.save_model(tmp_path / "t", seed=5, hidden=32), settings().data, tmp_path / "c", rows_per_shard=256
    )
    train_student(settings(sft, cache=str(rows), output=tmp_path / "other"))
    found = weights(tmp_path / "other")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_evaluation_data(settings, data_path):
    metrics = train_student(settings(eval_data=str(data_path)))
    assert metrics["eval_answer_tokens"] == 27
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_a_step_of_nothing_but_warm_up_is_refused(settings, tmp_path):
    """All of its steps would have a learning rate of 0."""
    one, two = (with_flags(BASE, {"training.warmup_steps": 1, "training.max_steps": n}) for n in (1, 2))
    with pytest.raises(UsageError, match=r"the run has 1 step, .* Set training.warmup_steps 0"):
        train_student(settings(one))
    train_student(settings(two))


def test_an_output_folder_in_use_is_refused(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is not empty; name another folder"):
        train_student(settings())
    with pytest.raises(InputNotFoundError, match="has no run.json, which says what its run was started with"):
        train_student(settings(resume=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_another_tokenizer_is_refused_before_training(settings, tmp_path):
    words = list(tiny.VOCABULARY)
    words[10], words[11] = words[11], words[10]
    student = tiny.save_model(tmp_path / "student", seed=3, hidden=24, words=words)
    with pytest.raises(TokenizerMismatchError, match="id 10: teacher 'picture', student 'and'"):
        train_student(settings(student=str(student)))


def test_the_teachers_chat_template_decides_the_text(settings, student_path, tmp_path, capsys):
    """A student with another template, or with none, is trained with the teacher's and saved with it."""
    train_student(settings(output=tmp_path / "own"))
    assert "chat template is missing or differs" not in capsys.readouterr().err
    expected = (student_path / "chat_template.jinja").read_text()
    for number, template in enumerate(["yes " + expected, None]):
        student, output = tmp_path / f"student-{number}", tmp_path / f"out-{number}"
        shutil.copytree(student_path, student)
        (student / "chat_template.jinja").write_text(template) if template else (
            student / "chat_template.jinja"
        ).unlink()
        train_student(settings(student=str(student), output=output))
        assert "it is trained and saved with the teacher's" in capsys.readouterr().err
        assert AutoProcessor.from_pretrained(output).chat_template == expected
        found, own = weights(output), weights(tmp_path / "own")
        assert all(torch.equal(found[name], own[name]) for name in own)
    sft = with_flags(BASE, {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0})
    with pytest.raises(ModelError, match="student-1 has no chat template; save one as chat_template.jinja"):
        train_student(settings(sft, student=str(student), cache=None, output=tmp_path / "x"))


def test_a_row_whose_tokens_differ_is_refused_with_the_first_one(settings, tmp_path):
    """The student's tokenizer lacks the last word, "no". That is no conflict of ids, but row 2 answers with it."""
    student = tiny.save_model(tmp_path / "student", seed=3, hidden=24, words=tiny.VOCABULARY[:-1])
    with pytest.raises(
        TokenizerMismatchError,
        match=r"row 2: .* differ first at text token \d+: student '<unk>' \(id 1\), teacher '.*' \(id 25\), after",
    ):
        train_student(settings(student=str(student)))


def test_ids_that_the_student_lacks_are_the_tails_and_their_mass_is_told(settings, teacher_path, tmp_path, capsys):
    """The last word of the teacher's tokenizer, "no", which these rows do not say."""
    data = tiny.write_data(tmp_path / "rows.parquet", [tiny.rows()[n] for n in (0, 1, 4)])
    cache = tiny.make_cache(teacher_path, data, tmp_path / "cache")
    student = tiny.save_model(tmp_path / "student", seed=3, hidden=24, words=tiny.VOCABULARY[:-1])
    whole = with_flags(BASE, {"training.max_steps": 1, "training.per_device_train_batch_size": 3})
    train_student(settings(whole, student=str(student), data=str(data), cache=str(cache)))
    opened = Cache.open(cache)
    records = [opened.record(n) for n in range(3)]
    said = capsys.readouterr().err
    for kind, name in (("vision", r" lacking_mass"), ("answer", "answer_lacking_mass")):
        tops = [getattr(record, kind) for record in records]
        mass = [torch.from_numpy(top.logits).double().softmax(1)[torch.from_numpy(top.ids) == 25] for top in tops]
        (told,) = re.findall(rf"{name} ([0-9.e-]+)", said)
        assert float(told) == pytest.approx(float(torch.cat(mass).mean()), rel=1e-3)
    train_student(
        settings(whole, student=str(tiny.save_model(tmp_path / "s", seed=3, hidden=24)), output=tmp_path / "o")
    )
    assert "lacking_mass" not in capsys.readouterr().err


def test_a_cache_of_other_data_is_refused_with_counts(settings, tmp_path):
    rows = tiny.rows()
    rows[3]["messages"][1] = tiny.turn("assistant", "dog")
    other = tiny.write_data(tmp_path / "other.parquet", rows)
    with pytest.raises(
        DataMismatchError, match=r"not the data of this cache: 1 of its 6 rows are not in it; the first is row 3"
    ):
        train_student(settings(data=str(other)))
    rows = tiny.rows()
    rows[3]["images"] = [tiny.png(99)]
    other = tiny.write_data(tmp_path / "other.parquet", rows)
    with pytest.raises(DataMismatchError, match=r"row 3 \(id 'one'\) .* is not what the teacher saw"):
        train_student(settings(data=str(other)))


def test_the_same_rows_in_another_file_and_order_are_the_same_data(settings, tmp_path, capsys):
    rows = tiny.rows()
    moved = tiny.write_llava(tmp_path, rows[::-1])
    train_student(settings(data=str(moved), image_root=tmp_path))
    assert "comparing all rows by their texts" in capsys.readouterr().err
    found = weights(tmp_path / "out")
    train_student(settings(output=tmp_path / "again"))
    assert all(torch.equal(value, found[name]) for name, value in weights(tmp_path / "again").items())


def test_a_part_of_the_cached_rows(settings, tmp_path, capsys):
    """Rows of both shards, in another order, over two epochs: each is paired with its own record."""
    part = tiny.write_data(tmp_path / "part.parquet", [tiny.rows()[n] for n in (4, 1, 3)])
    recipe = with_flags(BASE, {"training.max_steps": None, "training.num_train_epochs": 2})
    train_student(settings(recipe, data=str(part)))
    err = capsys.readouterr().err
    assert "3 of the cache's 6 samples are in" in err
    assert "on 3 samples of" in err
    assert "step 4/4" in err


def test_a_resumed_run_has_the_same_samples(settings, cache_path, data_path, tmp_path):
    """The data are the same and the cache has more of them now: the order of samples would be another one."""
    shutil.copytree(cache_path, tmp_path / "cache")
    for name in ("seal.json", "index.parquet", "index/000001.parquet"):
        (tmp_path / "cache" / name).unlink()
    recipe = with_flags(BASE, {"training.max_steps": 2, "training.save_strategy": "steps", "training.save_steps": 1})
    train_student(settings(recipe, cache=str(tmp_path / "cache"), partial=True))
    with pytest.raises(
        UsageError, match="--resume: this call differs from the one that .* was started with .*: samples changed"
    ):
        train_student(settings(recipe, resume=True))


def test_an_unsealed_cache_trains_only_when_asked(settings, cache_path, tmp_path, capsys):
    shutil.copytree(cache_path, tmp_path / "cache")
    (tmp_path / "cache" / "seal.json").unlink()
    (tmp_path / "cache" / "index" / "000001.parquet").unlink()
    with pytest.raises(CacheIncompleteError, match="not sealed, 1 of 2 shards"):
        train_student(settings(cache=str(tmp_path / "cache")))
    train_student(settings(cache=str(tmp_path / "cache"), partial=True))
    assert "training on the 4 samples committed so far" in capsys.readouterr().err


def test_a_smaller_k_than_stored_and_not_a_larger_one(settings, tmp_path):
    train_student(settings(with_flags(BASE, {"losses.top_k": 4})))
    with pytest.raises(UsageError, match=r"losses.top_k 27: the cache stores 26"):
        train_student(settings(with_flags(BASE, {"losses.top_k": 27}), output=tmp_path / "other"))


def test_accumulation_does_not_change_the_step(settings, tmp_path):
    """Six rows in one step: as one batch, or as three ragged micro-batches, one of them with a text-only row."""
    found = []
    for number, (size, accumulation) in enumerate(((6, 1), (2, 3))):
        flags = {
            "training.per_device_train_batch_size": size,
            "training.gradient_accumulation_steps": accumulation,
            "training.max_steps": 1,
            "training.optim": "sgd",  # a step in proportion to the gradient
            "training.max_grad_norm": 0.0,
            "training.lr_scheduler_type": "constant",
        }
        train_student(settings(with_flags(BASE, flags), output=tmp_path / str(number)))
        found.append(weights(tmp_path / str(number)))
    before = weights(Path(settings().student))
    for name, start in before.items():
        one, other = (run[name].double() - start.double() for run in found)
        assert float((one - other).norm()) <= 1e-4 * max(float(one.norm()), 1e-3), name
    assert any(not torch.equal(found[0][name], before[name]) for name in before)


def test_each_row_is_checked_by_its_key_when_it_is_read(student_path, cache_path, tmp_path):
    """The texts are the same and one image differs, which the check of a few rows at the start may miss."""
    rows = tiny.rows()
    rows[3]["images"] = [tiny.png(99)]
    cache, dataset = Cache.open(cache_path), Dataset(str(tiny.write_data(tmp_path / "rows.parquet", rows)))
    encoder = Encoder(load(str(student_path)).processor, 2)
    limits = TeacherLimits(vocabulary=26, n_student_tokens=26)
    samples = StudentSamples(dataset, encoder, cache.sample_rows.tolist(), cache, limits)
    assert samples[2].encoded.key == cache.sample_keys[2]
    with pytest.raises(DataMismatchError, match=r"row 3 \(id 'one'\) of .* is not what the teacher saw: its key is"):
        samples[3]
    other = StudentSamples(dataset, encoder, [0, 1], cache, limits, numbers=[1, 0])
    with pytest.raises(DataMismatchError, match="row 0"):
        other[0]


def test_answers_marked_differently_are_refused(cache_path):
    """The same text tokens, but one more of them is an answer."""
    record = Cache.open(cache_path).record(0)
    encoded = SimpleNamespace(
        text_ids=torch.from_numpy(record.text_ids).long(),
        answer_positions=torch.from_numpy(record.answer_positions[1:]),
        images=record.images,
    )
    with pytest.raises(TokenizerMismatchError, match=r"the answer tokens differ \(\d+ of the student, "):
        check_same_text(encoded, record, 0)


def test_a_student_that_sees_another_part_of_the_pictures_is_refused(settings, student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "student")
    path = tmp_path / "student" / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
        "size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    with pytest.raises(GeometryMismatchError, match="The teacher sees the whole image .*; the student sees its centre"):
        train_student(settings(student=str(tmp_path / "student")))
    assert not (tmp_path / "out").exists()
    sft = with_flags(BASE, {"losses.alpha": 1.0, "losses.beta": 0.0, "losses.gamma": 0.0})
    train_student(
        settings(sft, student=str(tmp_path / "student"))
    )  # trains on labels alone, so it may see another part
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without a teacher or a cache" in card


def test_images_at_other_places_of_the_text_are_refused(cache_path):
    cache = Cache.open(cache_path)
    record = cache.record(0)
    encoded = SimpleNamespace(
        text_ids=torch.from_numpy(record.text_ids).long(),
        answer_positions=torch.from_numpy(record.answer_positions),
        images=[replace(record.images[0], text_position=record.images[0].text_position + 1)],
    )
    with pytest.raises(TokenizerMismatchError, match="have the images at different positions in the text"):
        check_same_text(encoded, record, 0)


def test_the_order_is_ours(settings, tmp_path):
    """Shards of four and two rows with a window of one: the first epoch walks a whole shard before the other.

    The rehearsal before the first step takes the first of them.
    """
    seen = []
    plain = StudentSamples.__getitem__
    recipe = with_flags(BASE, {"training.max_steps": 3, "window": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentSamples, "__getitem__", lambda self, number: seen.append(number) or plain(self, number))
        train_student(settings(recipe))
    order = epoch_order([4, 2], 1, 42, 0).tolist()
    assert seen[:7] == [order[0], *order]


def test_resuming_another_run_is_refused(settings, tmp_path):
    recipe = with_flags(BASE, {"training.save_strategy": "steps", "training.save_steps": 2})
    train_student(settings(recipe))
    for flags, differing in (
        ({"student.vision_pool": 1}, "recipe.student.vision_pool was 2 and is 1"),
        ({"losses.alpha": 0.9}, "recipe.losses.alpha was 0.5 and is 0.9"),
        ({"losses.divergence": "jsd"}, "recipe.losses.divergence was reverse_kl and is jsd"),
        ({"losses.temperature": 2.0}, "recipe.losses.temperature was 1.0 and is 2.0"),
        ({"training.seed": 7}, "recipe.training.seed was None and is 7"),
    ):
        with pytest.raises(UsageError, match=f"--resume: this call differs .*: {differing}. Use the same settings"):
            train_student(settings(with_flags(recipe, flags), resume=True))


def test_settings_that_are_newer_than_a_run_do_not_end_it(settings, tmp_path, capsys):
    """These settings get their defaults, and the solver of assignments is not one that decides a run."""
    recipe = with_flags(BASE, {"training.save_strategy": "steps", "training.save_steps": 2})
    train_student(settings(recipe))
    path = tmp_path / "out" / "run.json"
    before = json.loads(path.read_text())
    assert "solver" not in before["recipe"]["losses"]
    del before["recipe"]["losses"]["divergence"], before["recipe"]["losses"]["temperature"]
    path.write_text(json.dumps(before))
    train_student(settings(recipe, resume=True))
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--resume: .*recipe.losses.divergence was reverse_kl and is jsd"):
        train_student(settings(with_flags(recipe, {"losses.divergence": "jsd"}), resume=True))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="solver cuda needs an NVIDIA GPU"):  # and not that it is another run
            train_student(settings(with_flags(recipe, {"losses.solver": "cuda"}), resume=True))


def test_bad_rows_to_evaluate_on_are_counted_and_cost_nothing(settings, tmp_path):
    rows = tiny.rows()
    rows[1]["images"] = [b"broken", tiny.png(3)]
    metrics = train_student(settings(eval_data=str(tiny.write_data(tmp_path / "eval.parquet", rows))))
    assert metrics["eval_skipped_rows"] == 1
    assert metrics["eval_answer_tokens"] == 24
    none = tiny.write_data(tmp_path / "none.parquet", rows[1:2])
    with pytest.raises(DataFormatError, match="nothing to evaluate on: none of the 1 rows"):
        train_student(settings(eval_data=str(none), output=tmp_path / "other"))
    assert (tmp_path / "other" / "model.safetensors").is_file(), "the trained student is saved before it is evaluated"


def test_another_image_processor_is_said(settings, student_path, tmp_path, capsys):
    shutil.copytree(student_path, tmp_path / "student")
    path = tmp_path / "student" / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"]["image_mean"] = [0.4, 0.4, 0.4]
    path.write_text(json.dumps(content))
    train_student(settings(student=str(tmp_path / "student")))
    assert "student and teacher prepare images differently (image_mean)" in capsys.readouterr().err


def test_the_share_of_padding_is_logged(settings, student_path, data_path, capsys):
    """Of one batch with all six rows, as their lengths say."""
    vlm = load(str(student_path))
    encoder = Encoder(AutoProcessor.from_pretrained(student_path), vlm.image_token_id)
    lengths = [encoder(Dataset(str(data_path)).sample(row)).n_tokens for row in range(6)]
    flags = {"training.max_steps": 1, "training.per_device_train_batch_size": 6, "training.logging_steps": 1}
    train_student(settings(with_flags(Recipe(), flags)))
    (told,) = re.findall(r"padding_share ([0-9.e-]+)", capsys.readouterr().err)
    assert float(told) == pytest.approx(1 - sum(lengths) / (6 * max(lengths)), rel=1e-3)
