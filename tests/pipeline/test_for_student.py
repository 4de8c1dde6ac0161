"""`--for-student`: obstacles that a training run would find later are reported before the teacher runs."""

import json
import shutil

import pytest
from tokenizers.processors import TemplateProcessing

from emkd.errors import GeometryMismatchError, InputNotFoundError, TokenizerMismatchError, UsageError
from emkd.pipeline import JobSettings
from emkd.pipeline.for_student import check_student
from emkd.pipeline.job_manifest import job_manifest
from emkd.samples import Dataset
from tests import tiny


def check(teacher_path, data_path, student, **chosen) -> None:
    settings = JobSettings(
        teacher=str(teacher_path), data=str(data_path), cache="unused", gpus_per_worker=0, for_student=str(student),
        **chosen,
    )  # fmt: skip
    dataset = Dataset(settings.data)
    check_student(settings, *job_manifest(settings, dataset), dataset)


def test_a_student_that_can_use_the_cache(teacher_path, data_path, student_path, capfd):
    check(teacher_path, data_path, student_path)
    assert "reads all of 6 rows, drawn from 6, as the teacher does" in capfd.readouterr().err


def test_another_image_processor_is_told(teacher_path, data_path, tmp_path, capfd):
    check(teacher_path, data_path, tiny.save_model(tmp_path / "student", seed=3, hidden=24, side=40))
    assert "prepare images differently (size)" in capfd.readouterr().err


def test_another_tokenizer(teacher_path, data_path, tmp_path):
    words = list(tiny.VOCABULARY)
    words[10], words[11] = words[11], words[10]
    student = tiny.save_model(tmp_path / "student", seed=3, hidden=24, words=words)
    with pytest.raises(TokenizerMismatchError, match="id 10: teacher 'picture', student 'and'"):
        check(teacher_path, data_path, student)


def test_the_teachers_chat_template_is_read_with(teacher_path, data_path, student_path, tmp_path, capfd):
    student = shutil.copytree(student_path, tmp_path / "student")
    template = student / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ m['role'] }}:", "{{ m['role'] }}: yes"))
    check(teacher_path, data_path, student)
    told = capfd.readouterr().err
    assert "chat template is missing or differs from the teacher's: it is trained and saved with the teacher's" in told
    assert "reads all of 6 rows, drawn from 6, as the teacher does" in told
    template.unlink()  # a base model, which never had one
    check(teacher_path, data_path, student)
    assert capfd.readouterr().err == told


def test_a_text_that_differs_all_the_same(teacher_path, data_path, student_path, tmp_path):
    """The vocabulary is the teacher's, but text is split differently."""
    student = shutil.copytree(student_path, tmp_path / "student")
    content = json.loads((student / "tokenizer.json").read_text())
    content["post_processor"] = TemplateProcessing(single="cat $A", special_tokens=[("cat", 19)]).__getstate__()
    content["post_processor"] = json.loads(content["post_processor"])
    (student / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        TokenizerMismatchError,
        match=r"row 0: the student's text has \d+ tokens and the teacher's \d+; they differ first at text token 0: "
        r"student 'cat' \(id 19\), teacher 'user:' \(id 4\)\. Both need",
    ):
        check(teacher_path, data_path, student)


def test_a_student_that_crops(teacher_path, data_path, student_path, tmp_path):
    student = shutil.copytree(student_path, tmp_path / "student")
    config = student / "processor_config.json"
    content = json.loads(config.read_text())
    content["image_processor"] |= {"do_center_crop": True, "crop_size": {"height": 20, "width": 20}}
    content["image_processor"] |= {"size": {"shortest_edge": 20}, "image_processor_type": "CLIPImageProcessor"}
    config.write_text(json.dumps(content))
    with pytest.raises(GeometryMismatchError, match='set .*"do_center_crop": false, "size": {"height": 20'):
        check(teacher_path, data_path, student)


def test_a_student_that_is_too_short(teacher_path, data_path, student_path, tmp_path):
    student = shutil.copytree(student_path, tmp_path / "student")
    config = student / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 30'))
    with pytest.raises(
        UsageError, match=r"cannot read [1-6] of 6 checked rows that the teacher can read: row \d: too-long"
    ):
        check(teacher_path, data_path, student)
    with pytest.raises(UsageError, match="too-long"):
        check(teacher_path, data_path, student, max_length=60)
    check(teacher_path, data_path, student, max_length=30)  # the teacher skips what is too long for the student


def test_no_such_student(teacher_path, data_path, tmp_path):
    with pytest.raises(InputNotFoundError, match="no model"):
        check(teacher_path, data_path, tmp_path / "nothing")


def test_rows_that_the_teacher_skips_are_no_obstacle(teacher_path, student_path, tmp_path, capfd):
    rows = tiny.rows()
    rows[0]["images"] = [b"broken"]
    check(teacher_path, tiny.write_data(tmp_path / "rows.parquet", rows), student_path)
    assert "reads all of 5 rows, drawn from 6, as the teacher does" in capfd.readouterr().err


def test_rows_are_taken_from_the_whole_dataset(teacher_path, data_path, student_path, tmp_path):
    """Every third of 48 rows is too long for the student, which 32 that are evenly spread would all miss."""
    student = shutil.copytree(student_path, tmp_path / "student")
    config = student / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 60'))
    rows = [tiny.rows()[0]] * 48
    long = {**rows[0], "messages": [tiny.turn("user", "<image>" + " what" * 50), tiny.turn("assistant", "red")]}
    check(teacher_path, tiny.write_data(tmp_path / "short.parquet", rows), student)
    with pytest.raises(UsageError, match=r"cannot read \d+ of 32 checked rows that the teacher can read: row \d+: too"):
        check(teacher_path, tiny.write_data(tmp_path / "long.parquet", [*rows[:2], long] * 16), student)


def test_ids_that_the_student_lacks_are_said(teacher_path, data_path, student_path, tmp_path, capfd):
    student = shutil.copytree(student_path, tmp_path / "student")
    content = json.loads((student / "tokenizer.json").read_text())
    word, number = max(content["model"]["vocab"].items(), key=lambda item: item[1])
    del content["model"]["vocab"][word]
    (student / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerMismatchError, match=rf"student '<unk>' \(id 1\), teacher '' \(id {number}\)"):
        check(teacher_path, data_path, student)
    assert f"the student's tokenizer lacks 1 of the teacher's ids: {word!r} ({number}). Rows" in capfd.readouterr().err
