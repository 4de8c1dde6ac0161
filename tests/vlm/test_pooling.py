"""A pooled student is an ordinary checkpoint: saved, loaded and used for generation, with every weight under its right
name."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from emkd.errors import ModelError, UsageError
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.vlm import load
from emkd.vlm.pooled_models import POOLED_CLASSES, PooledLlavaForConditionalGeneration, pool_tokens
from emkd.vlm.pooled_qwen import POOLED_QWENS
from emkd.vlm.pooling import FAMILIES, pooled
from tests import families, tiny
from tests.families import others


def test_pooling_averages_windows():
    features = torch.randn(2, 36, 5)
    found = pool_tokens(features, 3)
    grid = features.reshape(2, 6, 6, 5)
    for row in range(2):
        for column in range(2):
            window = grid[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(2, 9, 5)
            torch.testing.assert_close(found[:, 2 * row + column], window.mean(1))


@pytest.mark.parametrize("tokens", [15, 25])
def test_grids_that_do_not_fit_are_refused(tokens):
    with pytest.raises(ValueError, match="square grid is needed"):
        pool_tokens(torch.zeros(1, tokens, 2), 2)


@pytest.fixture
def pooled_student(student_path):
    student = load(str(student_path))
    student.model = pooled(student.model, student.processor, 2)
    return student


def test_every_weight_is_kept(pooled_student, student_path):
    plain = load(str(student_path)).model.state_dict()
    found = pooled_student.model.state_dict()
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_projector_outputs_are_averaged(pooled_student, student_path):
    pixels = torch.randn(3, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        plain = torch.stack(list(load(str(student_path)).model.get_image_features(pixels).pooler_output))
        found = torch.stack(list(pooled_student.model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(found, pool_tokens(plain, 2))


def test_saved_and_loaded_through_the_public_classes(pooled_student, tmp_path, data_path):
    pooled_student.model.save_pretrained(tmp_path)
    pooled_student.processor.save_pretrained(tmp_path)
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, PooledLlavaForConditionalGeneration)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.vision_pool == 2
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = Encoder(processor, model.config.image_token_id)(Dataset(str(data_path)).sample(0)).inputs
    assert int((inputs["input_ids"] == 2).sum()) == 4
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, pooled_student.model(**inputs).logits)
        assert (model(**inputs).logits[..., :28] != 0).any()


def test_generate(pooled_student, data_path):
    encoder = Encoder(pooled_student.processor, pooled_student.image_token_id)
    inputs = encoder(Dataset(str(data_path)).sample(0)).inputs
    found = pooled_student.model.generate(
        **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, suppress_tokens=[2]
    )
    ids = inputs
    for _ in range(3):  # without a key-value cache, token by token
        with torch.no_grad():
            logits = pooled_student.model(**ids, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # the image token: a random model may well say it
        following = logits.argmax(1, keepdim=True)
        ids = {
            "input_ids": torch.cat([ids["input_ids"], following], 1),
            "attention_mask": torch.ones(1, ids["input_ids"].shape[1] + 1, dtype=torch.long),
            "pixel_values": ids["pixel_values"],
        }
    assert torch.equal(found, ids["input_ids"])


def test_pooling_again(pooled_student):
    assert pooled(pooled_student.model, pooled_student.processor, 2) is pooled_student.model
    with pytest.raises(UsageError, match="averages 2 x 2 tokens already"):
        pooled(pooled_student.model, pooled_student.processor, 4)


def test_windows_that_do_not_divide_the_grid(student_path):
    student = load(str(student_path))
    with pytest.raises(UsageError, match=r"--vision-pool 3 does not divide this model's grid of 4 x 4"):
        pooled(student.model, student.processor, 3)


def test_it_takes_over_the_models_memory_and_its_way_to_answer(student_path):
    """No second copy of the weights, tied ones stay tied, and dropout stays as it was."""
    plain = load(str(student_path))
    plain.model.generation_config.max_new_tokens = 7
    places = {name: weight.data_ptr() for name, weight in plain.model.named_parameters()}
    changed = pooled(plain.model, plain.processor, 2)
    assert {name: weight.data_ptr() for name, weight in changed.named_parameters()} == places
    assert changed.generation_config.max_new_tokens == 7
    assert not any(module.training for module in changed.modules())
    assert not any(tensor.is_meta for tensor in (*changed.parameters(), *changed.buffers()))


def test_a_tied_head_stays_tied(tmp_path):
    config, processor = families.qwen2_vl(48)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    plain = load(str(families.write(config, processor, tmp_path / "model", 1)))
    assert plain.model.lm_head.weight is plain.model.get_input_embeddings().weight
    changed = pooled(plain.model, plain.processor, 2)
    assert changed.lm_head.weight is changed.get_input_embeddings().weight


def test_a_tower_without_square_tiles_is_refused(tmp_path):
    _, processor = others.mistral3(48)
    config, _ = families.llava(48)
    config.vision_config = others.mistral3(48)[0].vision_config
    plain = load(str(families.write(config, processor, tmp_path / "model", 1)))
    with pytest.raises(ModelError, match="a pixtral vision tower takes an image in its own shape"):
        pooled(plain.model, plain.processor, 2)


def test_the_table_of_families_names_each_by_its_model_type():
    """A pooled class under another family's name would give its models the wrong weights and placeholders."""
    kinds = {name: family.model_class for name, family in FAMILIES.items() if family.model_class is not None}
    assert {name: kind.config_class.model_type for name, kind in kinds.items()} == {n: f"{n}_pooled" for n in kinds}
    every = {*POOLED_CLASSES, *(model for model, _ in POOLED_QWENS)}
    assert set(kinds.values()) == every
