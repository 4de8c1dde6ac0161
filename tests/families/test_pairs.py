"""Teacher and student of different families, by commands."""

import re

import pytest

from emkd.cli import main
from emkd.vlm import load
from tests import families, tiny
from tests.families.naive import ROWS, STUDENT, TEACHER, call

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("teacher_family", "student_family"), [("internvl", "qwen2_vl"), ("qwen2_vl", "idefics3")])
def test_another_family_by_commands(teacher_family, student_family, data, tmp_path, capfd):
    """The log says what is left out; the student is saved with a template that writes its own tokens for an image."""
    teacher = families.save(teacher_family, tmp_path / "teacher", **TEACHER)
    student = families.save(student_family, tmp_path / "student", **STUDENT)
    cache = tiny.make_cache(teacher, data, tmp_path / "cache")
    call(
        "train-student", "--student", student, "--data", data, "--cache", cache, "--output", tmp_path / "out",
        "--max-steps", 1, "--batch-size", 6,
    )  # fmt: skip
    said = capfd.readouterr().err
    assert (
        f"the teacher is a {teacher_family}, the student a {student_family}: tokens that only one of them writes"
        in said
    )
    assert "is skipped" not in said
    saved = load(str(tmp_path / "out")).processor
    assert families.PLACEHOLDERS.get(student_family, "<image>") in saved.chat_template


def test_a_template_that_does_not_spell_out_its_images_is_refused(data, tmp_path, capfd):
    """At once, and not row by row."""
    teacher = families.save("llava", tmp_path / "teacher", **TEACHER)
    student = families.save("qwen2_vl", tmp_path / "student", **STUDENT)
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<image>'", "'<im' ~ 'age>'"))
    cache = tiny.make_cache(teacher, data, tmp_path / "cache")
    arguments = ["--student", student, "--data", data, "--cache", cache, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as left:
        main(["train-student", *map(str, arguments)])
    assert left.value.code == 2
    error = capfd.readouterr().err
    assert re.search(r"writes '<image>' for an image, .* replaces '<\|image_pad\|>'", error), error
    assert "is skipped" not in error


def test_a_template_without_images_is_enough_for_texts(tmp_path):
    """There is no image that it could not place."""
    teacher = families.save("llava", tmp_path / "teacher", **TEACHER)
    student = families.save("qwen2_vl", tmp_path / "student", **STUDENT)
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<image>'", "''"))
    texts = tiny.write_data(tmp_path / "texts.parquet", [ROWS[-1], ROWS[-1]])
    cache = tiny.make_cache(teacher, texts, tmp_path / "cache")
    arguments = ["--student", student, "--data", texts, "--cache", cache, "--output", tmp_path / "out"]
    call("train-student", *arguments, "--max-steps", 1)


@pytest.mark.parametrize("command", ["train-student", "cache-teacher"])
def test_models_of_one_family_have_to_write_an_image_alike(command, data, tmp_path, capfd):
    """Of another family these would be its own begin and end of an image."""
    teacher = families.save("internvl", tmp_path / "teacher", **TEACHER)
    config, processor = families.internvl(STUDENT["hidden"])
    processor.start_image_token, processor.end_image_token = "<|vision_start|>", "<|vision_end|>"
    for name in ("start_image_token", "end_image_token"):
        setattr(processor.tokenizer, name, getattr(processor, name))
    student = families.write(config, processor, tmp_path / "student", 2)
    cache = tmp_path / "cache"
    if command == "train-student":
        tiny.make_cache(teacher, data, cache)
        arguments = ["--student", student, "--output", tmp_path / "out", "--cache", cache, "--vision-pool", 2]
    else:
        arguments = ["--teacher", teacher, "--for-student", student, "--cache", cache, "--dry-run"]
    with pytest.raises(SystemExit) as left:
        main([command, "--data", str(data), *map(str, arguments)])
    assert left.value.code
    assert "student '<|vision_start|>' (id 5), teacher '<img>' (id 9)" in capfd.readouterr().err


def test_for_a_student_of_another_family(data, tmp_path, capfd):
    teacher = families.save("internvl", tmp_path / "teacher", **TEACHER)
    student = families.save("qwen2_vl", tmp_path / "student", **STUDENT)
    check = ["--teacher", teacher, "--for-student", student, "--data", data, "--cache", tmp_path / "cache"]
    call("cache-teacher", *check, "--dry-run", "--gpus-per-worker", 0)
    assert f"can use this cache: it reads all of {len(ROWS)} rows" in capfd.readouterr().err
