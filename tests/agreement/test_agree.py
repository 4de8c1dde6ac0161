"""One answer for three callers: all of them refuse the same models and warn about the same differences, in the same
words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from emkd.agreement.agree import Reader, TeacherSide, agree
from emkd.errors import EmkdError, GeometryMismatchError, ModelError, TeacherMismatchError, TokenizerMismatchError
from emkd.inspection.compare.against_teacher import LiveSettings, compare_with_teacher
from emkd.pipeline import JobSettings
from emkd.pipeline.for_student import check_student
from emkd.pipeline.job_manifest import job_manifest
from emkd.samples import Dataset
from emkd.trainer import Recipe, TrainSettings, train_student, with_flags
from emkd.vlm.identity import image_processor_settings, tokenizer_json
from tests import families, tiny
from tests.families.naive import ROWS, STUDENT, TEACHER

pytestmark = pytest.mark.slow

ONE_STEP = with_flags(Recipe(), {"training.per_device_train_batch_size": 8, "training.max_steps": 1})


class Callers:
    """The three callers, for one teacher and its data."""

    def __init__(self, folder: Path, teacher: Path, data: Path) -> None:
        self.folder, self.teacher, self.data = folder, teacher, data
        self.cache = tiny.make_cache(teacher, data, folder / "cache")

    def job(self, model: Path) -> None:
        """--for-student"""
        settings = JobSettings(
            teacher=str(self.teacher), data=str(self.data), cache="unused", gpus_per_worker=0, for_student=str(model)
        )
        dataset = Dataset(settings.data)
        check_student(settings, *job_manifest(settings, dataset), dataset)

    def training(self, model: Path) -> None:
        output = self.folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        cache = str(self.cache)
        train_student(
            TrainSettings(student=str(model), data=str(self.data), cache=cache, output=output, recipe=ONE_STEP)
        )

    def live(self, model: Path) -> None:
        """--against-teacher"""
        compare_with_teacher(self.cache, LiveSettings(against_teacher=str(model), data=str(self.data)), print)


@pytest.fixture
def callers(teacher_path, tmp_path) -> Callers:
    """A single row, so that every caller reads the same row first."""
    return Callers(tmp_path, teacher_path, tiny.write_data(tmp_path / "rows.parquet", tiny.rows()[:1]))


def refusal(call: Callable[[Path], None], model: Path) -> EmkdError:
    with pytest.raises(EmkdError) as raised:
        call(model)
    return raised.value


def changed(teacher_path: Path, folder: Path, name: str, change: Callable[[dict], None]) -> Path:
    """A copy of the teacher with one of its JSON files changed."""
    shutil.copytree(teacher_path, folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def other_meaning(teacher_path: Path, folder: Path) -> Path:
    words = list(tiny.VOCABULARY)
    words[10], words[11] = words[11], words[10]
    return tiny.save_model(folder, seed=1, hidden=32, words=words)


def other_pre_tokenizer(teacher_path: Path, folder: Path) -> Path:
    return changed(
        teacher_path, folder, "tokenizer.json", lambda content: content.update(pre_tokenizer={"type": "Whitespace"})
    )


def other_text(teacher_path: Path, folder: Path) -> Path:
    """The vocabulary is the teacher's, but every text starts with "cat"."""
    processor = json.loads(TemplateProcessing(single="cat $A", special_tokens=[("cat", 19)]).__getstate__())
    return changed(teacher_path, folder, "tokenizer.json", lambda content: content.update(post_processor=processor))


def cropping(teacher_path: Path, folder: Path) -> Path:
    crop = {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
        "size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20},
    }  # fmt: skip
    return changed(
        teacher_path, folder, "processor_config.json", lambda content: content["image_processor"].update(crop)
    )


CASES = {
    "another meaning of an id": (
        other_meaning,
        "the student's tokenizer is not the teacher's: 2 ids that both have mean different tokens (id 10: teacher "
        "'picture', student 'and'; id 11",
    ),
    "another pre-tokenizer": (other_pre_tokenizer, "the student's tokenizer has a different pre_tokenizer from"),
    "another text of a row": (
        other_text,
        "row 0: the student's text has 11 tokens and the teacher's 10; they differ first at text token 0: student 'cat' "
        "(id 19), teacher 'user:' (id 4). Both need",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_all_three_refuse_with_the_same_words(callers, teacher_path, tmp_path, case):
    make, expected = CASES[case]
    model = make(teacher_path, tmp_path / "model")
    job, training, live = (refusal(call, model) for call in (callers.job, callers.training, callers.live))
    assert isinstance(job, TokenizerMismatchError)
    assert type(training) is type(job)
    assert str(training) == str(job)
    assert str(job).startswith(expected)
    assert str(job).replace("student", "live model") in str(live)
    assert isinstance(live, TokenizerMismatchError | TeacherMismatchError)


def test_another_part_of_a_picture(callers, teacher_path, tmp_path):
    """Only different outputs refuse a live model, and its report names the settings."""
    model = cropping(teacher_path, tmp_path / "model")
    job, training = refusal(callers.job, model), refusal(callers.training, model)
    assert isinstance(job, GeometryMismatchError)
    assert (type(training), str(training)) == (type(job), str(job))
    assert "The teacher sees the whole image" in str(job)
    report = compare_with_teacher(
        callers.cache, LiveSettings(against_teacher=str(model), data=str(callers.data)), print
    )
    assert "do_center_crop" in report["image_processor_differs_in"]


def test_a_template_that_cannot_be_translated(tmp_path):
    """The template does not contain its placeholder literally, and the student's family has another one."""
    teacher = families.save("llava", tmp_path / "teacher", **TEACHER)
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<image>'", "'<im' ~ 'age>'"))
    callers = Callers(tmp_path, teacher, tiny.write_data(tmp_path / "rows.parquet", ROWS))
    student = families.save("qwen2_vl", tmp_path / "student", **STUDENT)
    job, training = refusal(callers.job, student), refusal(callers.training, student)
    assert isinstance(job, TokenizerMismatchError)
    assert (type(training), str(training)) == (type(job), str(job))
    expected = "writes '<image>' for an image, and the student's Qwen2VLProcessor replaces '<|image_pad|>' by vision"
    assert expected in str(job)


def test_no_chat_template_at_all(teacher_path, student_path, tmp_path):
    """A teacher cannot lack one, but old caches do not record it: then the student needs its own."""
    processor = tiny.new_processor()
    teacher = TeacherSide(
        tokenizer_json=tokenizer_json(teacher_path),
        chat_template=None,
        image_processor=image_processor_settings(processor),
        model_type="llava",
    )
    reader = Reader(path=student_path, processor=processor, model_type="llava_pooled")
    warnings: list[str] = []
    assert agree(teacher, reader, has_images=True, warn=warnings.append).image_processor_differs_in == ()
    assert warnings == []
    processor.chat_template = None
    for side in (teacher, None):
        with pytest.raises(ModelError, match="has no chat template; save one as chat_template.jinja"):
            agree(side, reader, has_images=True)


def warnings(said: str) -> list[str]:
    """Lines about how student and teacher differ."""
    lines = [line for line in said.splitlines() if not line.startswith("loading the student ")]
    return [line for line in lines if "the student" in line or "student and teacher" in line]


def test_what_is_no_obstacle_is_logged_alike(teacher_path, tmp_path, capfd):
    """Fewer ids, another chat template and other pixels: both callers accept them, and both log the differences."""
    rows = [tiny.rows()[n] for n in (0, 1, 4)]  # without the last word, "no"
    callers = Callers(tmp_path, teacher_path, tiny.write_data(tmp_path / "rows.parquet", rows))
    model = tiny.save_model(tmp_path / "model", seed=3, hidden=24, words=tiny.VOCABULARY[:-1])
    processor = tiny.new_processor(tiny.VOCABULARY[:-1])
    processor.image_processor.image_mean = [0.4] * 3
    processor.chat_template = "yes " + tiny.TEMPLATE
    processor.save_pretrained(model)
    capfd.readouterr()
    callers.job(model)
    job = warnings(capfd.readouterr().err)
    callers.training(model)
    assert warnings(capfd.readouterr().err) == job
    assert len(job) == 3
    for line, expected in zip(
        job,
        ("lacks 1 of the teacher's ids: 'no' (25)", "chat template is missing or differs", "(image_mean)"),
        strict=True,
    ):
        assert expected in line
    with pytest.raises(TokenizerMismatchError, match="the live model's tokenizer .* lacks 1 of the teacher's ids"):
        callers.live(model)


def test_what_all_three_accept(callers, teacher_path):
    for call in (callers.job, callers.training, callers.live):
        call(teacher_path)


def test_a_template_without_an_end_token_is_a_warning_for_both(teacher_path, student_path, tmp_path, capfd):
    teacher = shutil.copytree(teacher_path, tmp_path / "teacher")
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace(" <end>\\n", "\\n").replace(" <end>\n", "\n"))
    callers = Callers(tmp_path, teacher, tiny.write_data(tmp_path / "rows.parquet", tiny.rows()[:1]))
    for call in (callers.job, callers.training):
        capfd.readouterr()
        call(student_path)
        assert "the chat template writes no end token after answers" in capfd.readouterr().err
