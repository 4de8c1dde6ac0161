"""Ten families of transformers as teachers: from a saved checkpoint to a cache, and from there to a student's losses,
which are those of the teacher in memory."""

import io
from typing import Any

import pytest
import torch
from PIL import Image

from emkd.cli import main
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer.objective import Objective, Weights
from emkd.trainer.stream import Collator, StudentSamples, TeacherLimits
from emkd.vlm import load
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "rows.parquet", ROWS)


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def teacher(family, tmp_path_factory):
    return families.save(family, tmp_path_factory.mktemp("teacher"), **TEACHER)


@pytest.fixture(scope="module")
def student(family, tmp_path_factory):
    return families.save(family, tmp_path_factory.mktemp("student"), **STUDENT)


@pytest.fixture(scope="module")
def cache(teacher, data, tmp_path_factory):
    return Cache.open(tiny.make_cache(teacher, data, tmp_path_factory.mktemp("cache") / "cache"))


def naive_view(model: Any, processor: Any, family: str, row: dict[str, Any]) -> dense.View:
    """One row alone through the processor and the model themselves: prompt, positions and images found anew."""
    text = ""
    for message in row["messages"]:
        content = message["content"].replace("<image>", families.PLACEHOLDERS.get(family, "<image>"))
        text += f"{message['role']}: {content}" + (" <end>\n" if message["role"] == "assistant" else "\n")
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
        elif token >= len(families.SPECIALS):  # words stand between images, whatever a family wraps them in
            new_image = True
        if answering:
            answers.append(place)
        answering = token == families.ID["assistant:"] or (answering and token != families.ID["<end>"])
    assert len(images) == len(pictures)
    return dense.View(
        text=hidden[ids != model.config.image_token_id].double(),
        vision=[hidden[places].double() for places in images],
        vision_logits=[logits[places, :V].double() for places in images],
        answer_logits=logits[torch.tensor(answers) - 1, :V].double(),
        answer_ids=ids[answers],
    )


def cached_losses(student: Any, cache: Cache, data: Any) -> Any:
    samples = StudentSamples(
        Dataset(str(data)),
        Encoder(student.processor, student.image_token_id),
        cache.sample_rows.tolist(),
        cache,
        TeacherLimits(vocabulary=cache.manifest.vocabulary_size, n_student_tokens=student.n_tokens),
    )
    batch = Collator(0)([samples[i] for i in range(len(samples))])
    objective = Objective(Weights(), V)
    return objective(student.model, student.model, batch["inputs"], batch["samples"], objective.count(batch["samples"]))


def test_cached_losses_are_those_of_the_teacher_in_memory(family, teacher, student, cache, data):
    assert (len(cache), cache.skipped.num_rows) == (len(ROWS), 0), cache.skipped.to_pylist()
    loaded = load(str(student))
    found = cached_losses(loaded, cache, data)
    memory = load(str(teacher))
    with torch.no_grad():
        theirs = [naive_view(memory.model, memory.processor, family, row) for row in ROWS]
        ours = [naive_view(loaded.model, loaded.processor, family, row) for row in ROWS]
    expected = dense.losses(ours, theirs)
    for name in ("sup", "rld", "vsd", "vlad"):
        reference = float(expected[name])
        assert reference > 1e-3, "a loss of nothing would agree with anything"
        assert abs(float(getattr(found, name).detach()) - reference) <= 1e-5 * reference, name


def test_by_commands(family, teacher, student, data, tmp_path, capfd):
    """What a user types: the job on Ray, training that stops and goes on, and a student that loads and generates."""
    call("cache-teacher", "--teacher", teacher, "--data", data, "--cache", tmp_path / "cache", "--gpus-per-worker", 0)
    call("inspect", tmp_path / "cache")
    assert f"{len(ROWS)} samples" in capfd.readouterr().out
    train = ["train-student", "--student", student, "--data", data, "--cache", tmp_path / "cache"]
    train += ["--output", tmp_path / "out", "--batch-size", 2, "--recipe", tmp_path / "recipe.yaml"]
    (tmp_path / "recipe.yaml").write_text("training: {max_steps: 2, save_steps: 1}")
    call(*train)
    trained = load(str(tmp_path / "out"))
    text = families.template(family)
    inputs = trained.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what is that"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert text and trained.model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def picture() -> Image.Image:
    return Image.open(io.BytesIO(tiny.png(5, 24, 50))).convert("RGB")


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert not left.value.code
