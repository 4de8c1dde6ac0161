"""Conversations, and what a naive pass of both models in memory makes of them."""

import io
from typing import Any

import pytest
import torch
from PIL import Image

from emkd.cli import main
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer.data.samples import Collator, StudentSamples, TeacherLimits
from emkd.trainer.losses.weights import Weights
from emkd.trainer.objective.objective import Objective
from emkd.vlm.pooling import family_of
from tests import families, tiny
from tests.trainer import dense

V = len(families.VOCABULARY)
TEACHER, STUDENT = {"seed": 1, "hidden": 48}, {"seed": 2, "hidden": 64}


def row(name: str, sizes: list[tuple[int, int]], *turns: str) -> dict[str, Any]:
    """A conversation of user and assistant in turn, with pictures of these heights and widths."""
    seed = sum(map(ord, name))
    pictures = [tiny.png(seed + n, *size) for n, size in enumerate(sizes)]
    messages = [tiny.turn(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
    return {"id": name, "images": pictures, "messages": messages}


ROWS = [
    row("one", [(24, 24)], "<image>\nwhat is in this picture", "red cat"),
    row("wide", [(24, 60)], "<image>\nwhat is that", "big dog"),
    row("high", [(70, 26)], "is <image> blue", "none of them"),
    row("several", [(40, 40), (24, 50)], "<image> and <image> what is that", "one small dog"),
    row("every turn", [(30, 30), (24, 44)], "what is <image>", "dog", "and <image>", "small green cat"),
    row("text", [], "is that one red", "no it is blue"),
]


def naive_view(
    model: Any, processor: Any, family: str, row: dict[str, Any], words: bool = False
) -> tuple[dense.View, list[int]]:
    """One row alone through the processor and the model, without emkd: prompt, positions and images found
    independently; and the ids of its text. words: without what the family writes around and within images"""
    text = ""
    for message in row["messages"]:
        content = message["content"].replace("<image>\n", "<image>")
        content = content.replace("<image>", families.PLACEHOLDERS.get(family, "<image>") + "\n")
        text += f"user:\n{content}\n" if message["role"] == "user" else f"assistant: {content} <end>\n"
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in row["images"]]
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    ids = inputs["input_ids"][0]
    hidden, logits = model.model(**inputs).last_hidden_state[0], model(**inputs).logits[0]
    images: list[list[int]] = []
    answers: list[int] = []
    new_image, answering = True, False
    for place, token in enumerate(ids.tolist()):
        if token == model.config.image_token_id:
            if new_image:
                images.append([])
            images[-1].append(place)
            new_image = False
        elif is_word(token):  # words stand between images, whatever a family wraps them in
            new_image = True
        if answering:
            answers.append(place)
        answering = token == families.ID["assistant:"] or (answering and token != families.ID["<end>"])
    assert len(images) == len(pictures)
    is_text = ids != model.config.image_token_id
    if words:
        is_text &= torch.tensor([not beside_image(ids.tolist(), place, model) for place in range(len(ids))])
    view = dense.View(
        text=hidden[is_text].double(),
        vision=[hidden[places].double() for places in images],
        vision_logits=[logits[places, :V].double() for places in images],
        answer_logits=logits[torch.tensor(answers) - 1, :V].double(),
        answer_ids=ids[answers],
    )
    return view, ids[is_text].tolist()


def is_word(token: int) -> bool:
    return token >= len(families.SPECIALS) and families.VOCABULARY[token] not in families.NEWLINES


def beside_image(ids: list[int], place: int, model: Any) -> bool:
    """Whether only newlines and the tokens that families write around images are between this token and an image."""
    for side in (ids[: place + 1][::-1], ids[place:]):
        for token in side:
            if token == model.config.image_token_id:
                return True
            if is_word(token) or token == families.ID["<end>"]:
                break
    return False


def cached_losses(student: Any, cache: Cache, data: Any) -> Any:
    samples = StudentSamples(
        Dataset(str(data)),
        Encoder(student.processor, student.image_token_id),
        cache.sample_rows.tolist(),
        cache,
        TeacherLimits(vocabulary=cache.manifest.vocabulary_size, n_student_tokens=student.n_tokens),
        other_family=family_of(student.model.config.model_type) != cache.manifest.teacher.architecture,
    )
    batch = Collator(0)([samples[i] for i in range(len(samples))])
    objective = Objective(Weights(), V)
    return objective(student.model, student.model, batch["inputs"], batch["samples"], objective.count(batch["samples"]))


def check_losses(student: Any, cache: Cache, data: Any, teacher: Any, family: str) -> tuple[list[Any], list[Any]]:
    """The student's losses from the cache equal the losses with both models in memory; the naive views of both."""
    found = cached_losses(student, cache, data)
    with torch.no_grad():
        ours, theirs = (
            [naive_view(one.model, one.processor, family, row)[0] for row in ROWS] for one in (student, teacher)
        )
    expected = dense.losses(ours, theirs)
    for name in ("sup", "rld", "vsd", "vlad"):
        reference = float(expected[name])
        assert reference > 1e-3, "a loss of nothing would agree with anything"
        assert abs(float(getattr(found, name).detach()) - reference) <= 1e-5 * reference, name
    return ours, theirs


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert not left.value.code
