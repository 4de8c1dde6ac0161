"""The demonstration's tokenizer, processor and model behave like those of a large LLaVA."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from emkd.demo.models import (
    N_VISION_TOKENS,
    WORDS,
    new_processor,
    new_student,
    new_teacher,
    save_model,
    sine_positions,
)
from emkd.demo.scenes import ANSWERS, QUESTIONS, conversation, file_scenes, write_scenes


@pytest.fixture(scope="module")
def processor():
    return new_processor(pads=True)


@pytest.fixture(scope="module")
def scenes():
    return file_scenes(3, "train", seed=0)


@pytest.fixture(scope="module")
def messages(scenes):
    return conversation(scenes.order[0], scenes.answers[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = new_teacher(0)
    save_model(model, new_processor(pads=True), folder)
    return folder, model


def in_parts(messages):
    """Contents as lists of parts, which is how datasets with images are passed on."""
    return [
        {
            "role": turn["role"],
            "content": [{"type": "image"}] * turn["content"].startswith("<image>")
            + [{"type": "text", "text": turn["content"].removeprefix("<image>")}],
        }
        for turn in messages
    ]


def encode(processor, messages, image):
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(text=[text], images=[image], return_tensors="pt")


def test_every_word_is_one_token(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) == len(WORDS) == len(set(WORDS)) == 23
    for word in (*QUESTIONS, *ANSWERS):
        assert tokenizer(word)["input_ids"] == [WORDS.index(word)]
    assert tokenizer("<image>b2? seven")["input_ids"] == [WORDS.index(w) for w in ("<image>", "b2?", "seven")]
    assert tokenizer("b2? eleven")["input_ids"] == [WORDS.index("b2?"), tokenizer.unk_token_id]


def test_conversation_has_64_image_tokens_then_one_token_a_turn(processor, messages, scenes):
    inputs = encode(processor, in_parts(messages), scenes.images[0])
    ids = inputs["input_ids"][0]
    assert N_VISION_TOKENS == 64
    assert (ids[:64] == WORDS.index("<image>")).all()
    words = [turn["content"].removeprefix("<image>") for turn in messages]
    assert [WORDS[i] for i in ids[64:]] == words
    assert inputs["pixel_values"].shape == (1, 3, 40, 40)


def test_strings_and_parts_give_the_same_tokens(processor, messages, scenes):
    one, other = (encode(processor, form, scenes.images[0]) for form in (messages, in_parts(messages)))
    assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize("form", [list, in_parts])
def test_a_prefix_of_the_conversation_renders_as_a_prefix(processor, messages, form):
    turns = form(messages)

    def rendered(n, ask):
        text = processor.apply_chat_template(turns[:n], tokenize=False, add_generation_prompt=ask)
        return text, processor.tokenizer(text)["input_ids"]

    whole_text, whole_ids = rendered(len(turns), False)
    for n in range(1, len(turns)):
        text, ids = rendered(n, True)
        assert (text, ids) == rendered(n, False)
        assert whole_text.startswith(text)
        assert whole_ids[: len(ids)] == ids
        assert len(ids) == n + 1  # one per turn, and the image's


def test_a_teacher_pads_with_grey_and_a_student_stretches(processor, scenes):
    wide = torch.from_numpy(scenes.images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    padded = processor.image_processor(images=list(scenes.images), return_tensors="pt")["pixel_values"]
    assert torch.allclose(padded[:, :, 10:30], wide, atol=1e-6)
    assert padded[:, :, :10].abs().max() < 0.005
    assert padded[:, :, 30:].abs().max() < 0.005
    student = new_processor(pads=False)
    stretched = student.image_processor(images=list(scenes.images), return_tensors="pt")["pixel_values"]
    assert stretched.shape == padded.shape
    assert torch.allclose(stretched.unflatten(2, (20, 2)).mean(dim=3), wide, atol=0.3)


def test_png_of_the_file_gives_the_same_pixels_as_the_array(tmp_path, processor, scenes):
    row = pq.read_table(write_scenes(tmp_path / "x.parquet", 3, "train", seed=0)).to_pylist()[1]
    image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
    one, other = (encode(processor, row["messages"], x) for x in (image, scenes.images[1]))
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_saved_processor_reads_the_same(saved, processor, messages, scenes):
    loaded = AutoProcessor.from_pretrained(saved[0])
    assert type(loaded) is type(processor)
    assert loaded.tokenizer.backend_tokenizer.to_str() == processor.tokenizer.backend_tokenizer.to_str()
    one, other = (encode(p, in_parts(messages), scenes.images[0]) for p in (processor, loaded))
    assert torch.equal(one["input_ids"], other["input_ids"])
    # AutoProcessor takes torchvision's class where it is installed, whose arithmetic differs in the last bit.
    assert torch.allclose(one["pixel_values"], other["pixel_values"], atol=1e-6)


def test_saved_model_loads_whole(saved, processor, messages, scenes):
    folder, model = saved
    assert sorted(path.suffix for path in folder.glob("model*")) == [".safetensors"]
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    inputs = encode(processor, in_parts(messages), scenes.images[0])
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_model_generates_an_answer_for_a_question(saved, processor, messages, scenes):
    inputs = encode(processor, in_parts(messages[:1]), scenes.images[0])
    grown = saved[1].generate(**inputs, max_new_tokens=1, do_sample=False)
    assert grown.shape == (1, 66)


def test_teacher_has_the_shape_that_the_example_needs(saved, processor):
    model = saved[1]
    assert model.config.image_token_id == processor.image_token_id
    assert model.get_output_embeddings().weight.shape == (23, 64)
    assert 150_000 < sum(parameter.numel() for parameter in model.parameters()) < 180_000


def test_teacher_is_a_function_of_its_seed_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = new_teacher(1), new_teacher(1), new_teacher(2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_tower_starts_from_positions_that_tell_rows_from_columns():
    table = sine_positions(8, 64)
    assert table.shape == (64, 64)
    assert torch.pdist(table).min() > 1  # no two positions alike
    grid = table.unflatten(0, (8, 8))
    assert (grid[:, :, :32] == grid[:, :1, :32]).all()  # the first half knows the row
    assert (grid[:, :, 32:] == grid[:1, :, 32:]).all()
    assert torch.equal(new_teacher(0).model.vision_tower.embeddings.position_embedding.weight, table)


def test_student_starts_as_the_teacher_and_is_a_model_of_its_own(saved):
    teacher = saved[1]
    student = new_student(teacher, seed=3)
    assert student.config.to_dict() == teacher.config.to_dict()
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    assert all(torch.equal(one, other) and one.data_ptr() != other.data_ptr() for one, other in pairs)
