import pytest
from transformers import AutoProcessor

from emkd.agreement.template import adopt_template, check_places_images
from emkd.errors import TokenizerMismatchError
from emkd.samples.conversation import parse_turns
from emkd.samples.render import template_of
from emkd.samples.template import image_text
from tests import families, tiny
from tests.samples.test_render import CHATML, LLAVA, ONEVISION, TWO, byte_level, processor_of


def rendered(processor) -> str:
    messages = [turn.as_message() for turn in parse_turns(TWO)]
    return processor.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("before", [ONEVISION, None, {"default": ONEVISION, "tools": LLAVA}])
def test_a_student_takes_over_the_teachers_template_and_keeps_it(tmp_path, before):
    """After saving and loading, processor and tokenizer have the teacher's template, with any template before."""
    student, teacher = tiny.new_processor(), processor_of(byte_level(), CHATML)
    student.chat_template = student.tokenizer.chat_template = before
    assert adopt_template(student, template_of(teacher)).changed
    assert not adopt_template(student, template_of(teacher)).changed, "it has it already"
    student.save_pretrained(tmp_path)
    assert not (tmp_path / "additional_chat_templates").exists()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    for found in (student, loaded):
        assert rendered(found) == rendered(teacher)
        assert template_of(found) == found.tokenizer.chat_template == CHATML


def test_a_cache_without_a_template_leaves_the_student_its_own():
    student = tiny.new_processor()
    assert not adopt_template(student, None).changed
    assert template_of(student) == tiny.TEMPLATE


QWEN = families.PLACEHOLDERS["qwen2_vl"]


def qwen(template):
    _, processor = families.qwen2_vl(48)
    processor.chat_template = processor.tokenizer.chat_template = template
    return processor


def test_its_own_way_to_write_an_image_stays():
    student = qwen(families.template("qwen2_vl"))
    assert image_text(student) == QWEN
    adopted = adopt_template(student, families.template("llava"))
    assert (adopted.changed, adopted.guessed) == (False, None), "it had the very same but for the image"
    assert template_of(student) == student.tokenizer.chat_template == families.template("qwen2_vl")


def test_a_template_that_wants_a_system_turn_says_it_too():
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    student = qwen(strict + families.template("qwen2_vl"))
    adopted = adopt_template(student, families.template("llava"))
    assert (adopted.changed, adopted.guessed) == (True, None)
    assert template_of(student) == families.template("qwen2_vl")


@pytest.mark.parametrize("before", [None, "{{ raise_exception('never') }}"])
def test_what_had_to_be_guessed_is_told(before):
    student = qwen(before)
    adopted = adopt_template(student, families.template("llava"))
    assert (adopted.changed, adopted.guessed) == (True, "<|image_pad|>")
    assert image_text(student) == "<|image_pad|>"
    assert adopt_template(qwen(before), families.template("qwen2_vl")).guessed is None, "nothing had to be translated"


def test_a_template_that_drops_images_is_left_as_it_is():
    dropping = families.template("llava").replace("<image>", "")
    student = qwen(families.template("qwen2_vl"))
    adopt_template(student, dropping)
    assert template_of(student) == dropping
    with pytest.raises(TokenizerMismatchError, match="writes '' for an image, .* It drops images"):
        check_places_images(student)
