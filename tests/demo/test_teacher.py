"""Training the demonstration's teacher: the parts, and a run of a few steps."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from emkd.demo.models import new_processor, new_teacher
from emkd.demo.places import places
from emkd.demo.scenes import ANSWERS, QUESTIONS, Scenes, conversation, file_scenes, fresh_scenes
from emkd.demo.teacher import (
    accuracy,
    asked_positions,
    model_inputs,
    named,
    train_language,
    train_teacher,
    train_tower,
)
from emkd.demo.threads import one_thread


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def processor():
    return new_processor(pads=True)


def test_inputs_of_a_batch_are_those_of_its_scenes_alone(processor):
    scenes = file_scenes(3, "train", seed=0)
    batch = model_inputs(processor, scenes)
    assert batch["input_ids"].shape == (3, 64 + 16)
    for number in range(3):
        messages = conversation(scenes.order[number], scenes.answers[number])
        text = processor.apply_chat_template(messages, tokenize=False)
        alone = processor(text=text, images=scenes.images[number], return_tensors="pt")
        assert set(alone) == set(batch)
        assert all(torch.equal(alone[name][0], batch[name][number]) for name in batch)


def test_asked_positions_are_the_questions_and_answers_follow(processor):
    scenes = file_scenes(2, "train", seed=1)
    ids = model_inputs(processor, scenes)["input_ids"]
    asked = asked_positions(ids)
    words = processor.tokenizer.convert_ids_to_tokens
    assert words(ids[asked].tolist()) == [QUESTIONS[cell] for cell in scenes.order.ravel()]
    assert words(ids[asked.roll(1, dims=1)].tolist()) == [ANSWERS[label] for label in scenes.answers.ravel()]


def test_vision_tokens_learn_the_word_of_their_content_and_the_question_of_their_cell(processor):
    scenes = file_scenes(2, "train", seed=1)
    cells = places(pads=True)
    probabilities = named(scenes, cells)
    assert probabilities.shape == (2, 64, 23)
    assert torch.allclose(probabilities.sum(dim=2), torch.ones(2, 64))
    vocabulary = processor.tokenizer.get_vocab()
    for token, cell in enumerate(cells.tolist()):
        words = ["<pad>", "<pad>"] if cell < 0 else [ANSWERS[scenes.labels[1, cell]], QUESTIONS[cell]]
        expected = torch.zeros(23)
        for word, share in zip(words, (0.7, 0.3), strict=True):
            expected[vocabulary[word]] += share
        assert torch.allclose(probabilities[1, token], expected), token


@pytest.mark.slow
def test_naming_is_learnt_only_if_it_is_asked_for(processor):
    scenes = file_scenes(4, "train", seed=0)
    losses = {}
    for naming in (0.0, 1.0):
        model = new_teacher(0)
        train_language(model, processor, itertools.repeat(scenes), 40, naming=naming)
        with torch.inference_mode():
            logits = model(**model_inputs(processor, scenes)).logits[:, :64]
        wanted = named(scenes, places(pads=True))
        losses[naming] = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1)))
    assert losses[1.0] < 0.7 * losses[0.0]


def test_accuracy_counts_likeliest_words(processor):
    """A model that always says "one" is right where "one" is true, in batches of any size."""
    model = new_teacher(0)
    one = torch.tensor([processor.tokenizer.get_vocab()["one"]])
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, one, torch.inf))
    scenes = file_scenes(7, "validation", seed=0)
    for batch_size in (3, 50):
        assert accuracy(model, processor, scenes, batch_size) == (scenes.answers == 1).mean()


@pytest.mark.slow
def test_tower_learns_and_is_frozen_and_nothing_else_moves(processor):
    model = new_teacher(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train_tower(model, processor, fresh_scenes("train", 16, 0), 60)
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("vision_tower" in name for name in moved)
    assert "model.vision_tower.post_layernorm.weight" not in moved  # LLaVA reads what comes before it
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())


def test_language_model_learns_one_batch_by_heart_with_the_tower_frozen(processor):
    model = new_teacher(0)
    model.model.vision_tower.requires_grad_(False)
    tower = {name: t.clone() for name, t in model.model.vision_tower.state_dict().items()}
    scenes = file_scenes(2, "train", seed=0)
    before = accuracy(model, processor, scenes)
    losses = train_language(model, processor, itertools.repeat(scenes), 40)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert accuracy(model, processor, scenes) > before
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, tower[name])


def test_run_of_a_few_steps_saves_a_whole_teacher(tmp_path):
    seen: list[tuple[str, int, int]] = []
    report = train_teacher(tmp_path / "a", tower_steps=2, steps=3, on_step=lambda *step: seen.append(step))
    assert seen == [("tower", 1, 2), ("tower", 2, 2), *(("language", n, 3) for n in (1, 2, 3))]
    assert report["seconds"] == pytest.approx(report["tower_seconds"] + report["language_seconds"])
    assert all(np.isfinite(value) for value in report.values())

    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert info["missing_keys"] == set()
    scenes = file_scenes(2, "validation", seed=0)
    assert 0 <= accuracy(model, AutoProcessor.from_pretrained(tmp_path / "a"), scenes) <= 1


def test_same_seed_same_teacher(tmp_path):
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        train_teacher(tmp_path / name, seed=seed, tower_steps=2, steps=2)
    one, again, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_training_asks_for_digits_of_its_own_pool_alone(tmp_path, monkeypatch):
    drawn: list[str] = []

    def spy(pool: str, batch_size: int, seed: int):
        drawn.append(pool)
        return fresh_scenes(pool, batch_size, seed)

    monkeypatch.setattr("emkd.demo.teacher.fresh_scenes", spy)
    train_teacher(tmp_path, tower_steps=1, steps=1)
    assert drawn == ["train"]


def test_threads_are_given_back():
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_scenes_of_a_slice_stay_together():
    scenes = file_scenes(4, "train", seed=0)
    part = scenes[1:3]
    assert isinstance(part, Scenes)
    assert np.array_equal(part.answers, scenes.answers[1:3])
