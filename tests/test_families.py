"""Ten families of transformers as teachers: from a saved checkpoint to a cache, and from there to a student's losses,
which are those of the teacher in memory."""

import io
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image

from emkd.cli import main
from emkd.errors import ModelError, UsageError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.samples.template import adopt_template
from emkd.storage.cache import Cache
from emkd.trainer.objective import Objective, Weights
from emkd.trainer.stream import Collator, StudentSamples, TeacherLimits
from emkd.vlm import load
from emkd.vlm.pooling import family_of, pooled
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


def naive_view(
    model: Any, processor: Any, family: str, row: dict[str, Any], words: bool = False
) -> tuple[dense.View, list[int]]:
    """One row alone through the processor and the model themselves: prompt, positions and images found anew; and the ids
    of its text. words: without what the family writes around and within images"""
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
    """Whether nothing but newlines and what families wrap images in stands between this and an image."""
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
    """The student's losses from the cache are those of both models in memory; the naive views of both."""
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


@pytest.mark.parametrize("window", [1, 2])
def test_cached_losses_are_those_of_the_teacher_in_memory(family, window, teacher, student, cache, data):
    """With the vision tokens that the student has, and with a quarter of them."""
    assert (len(cache), cache.skipped.num_rows) == (len(ROWS), 0), cache.skipped.to_pylist()
    loaded = load(str(student))
    loaded.model = pooled(loaded.model, loaded.processor, window)
    ours, theirs = check_losses(loaded, cache, data, load(str(teacher)), family)
    for few, many in zip(ours, theirs, strict=True):
        for own, whole in zip(few.vision, many.vision, strict=True):
            assert (len(own) <= len(whole) / 2) if window == 2 else (len(own) == len(whole))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    return {name: families.save(name, tmp_path_factory.mktemp(name), **STUDENT) for name in families.FAMILIES}


def test_students_of_every_family(family, teacher, students, cache, data):
    """With other hidden sizes, other tiles, a quarter of their vision tokens, and their own way to write an image: it is
    left out of what is compared, on both sides, where it is not the teacher's."""
    memory = load(str(teacher))
    for name, path in students.items():
        loaded = load(str(path))
        adopt_template(loaded.processor, cache.manifest.tokenizer.chat_template)
        loaded.model = pooled(loaded.model, loaded.processor, 2)
        found = cached_losses(loaded, cache, data)
        with torch.no_grad():
            texts = [
                naive_view(one.model, one.processor, of, ROWS[0])[1] for one, of in ((memory, family), (loaded, name))
            ]
            words = texts[0] != texts[1]
            theirs = [naive_view(memory.model, memory.processor, family, row, words) for row in ROWS]
            ours = [naive_view(loaded.model, loaded.processor, name, row, words) for row in ROWS]
        assert [text for _, text in ours] == [text for _, text in theirs]
        expected = dense.losses([view for view, _ in ours], [view for view, _ in theirs])
        for part in ("sup", "rld", "vsd", "vlad"):
            assert float(getattr(found, part).detach()) == pytest.approx(float(expected[part]), rel=1e-5), (name, part)


@pytest.mark.parametrize(("teacher_family", "student_family"), [("internvl", "qwen2_vl"), ("qwen2_vl", "idefics3")])
def test_another_family_by_commands(teacher_family, student_family, data, tmp_path, capfd):
    """What is left out is said; the student is saved with a template that has its own way to write an image."""
    teacher = families.save(teacher_family, tmp_path / "teacher", **TEACHER)
    student = families.save(student_family, tmp_path / "student", **STUDENT)
    cache = tiny.make_cache(teacher, data, tmp_path / "cache")
    call(
        "train-student", "--student", student, "--data", data, "--cache", cache, "--output", tmp_path / "out",
        "--max-steps", 1, "--batch-size", 6,
    )  # fmt: skip
    said = capfd.readouterr().err
    assert f"the teacher is a {teacher_family}, the student a {student_family}: what only one of them writes" in said
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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_qwens_of_fewer_tokens_take_no_videos(student):
    changed = load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    with pytest.raises(NotImplementedError, match="takes pictures, not videos"):
        changed.model.get_video_features(torch.zeros(4, 8), torch.tensor([[1, 4, 4]]))


@pytest.mark.parametrize("family", ["internvl"], indirect=True)
def test_the_config_counts_what_the_processor_writes(student):
    changed = load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    assert changed.model.config.image_seq_length == changed.processor.image_seq_length == 1


def features(loaded: Any, height: int, width: int) -> torch.Tensor:
    """[n, d] what the language model is given of one picture."""
    picture = Image.open(io.BytesIO(tiny.png(3, height, width))).convert("RGB")
    text = families.PLACEHOLDERS.get(loaded.model.config.model_type.removesuffix("_pooled"), "<image>")
    inputs = dict(loaded.processor(text=[text], images=[picture], return_tensors="pt"))
    places = int((inputs.pop("input_ids") == loaded.image_token_id).sum())
    wanted = ("pixel_values", "image_sizes", "batch_num_images", "pixel_attention_mask")
    with torch.no_grad():
        found = loaded.model.get_image_features(**{n: inputs[n] for n in wanted if n in inputs}).pooler_output
    found = torch.cat([one.reshape(-1, one.shape[-1]) for one in found])
    assert len(found) == places, "as many placeholders as there are vision tokens"
    return found


def blocks(grid: torch.Tensor) -> torch.Tensor:
    """[H, W, d] -> [H/2, W/2, d], naive means of 2 x 2 neighbours."""
    return torch.stack(
        [
            torch.stack([grid[i : i + 2, j : j + 2].mean((0, 1)) for j in range(0, grid.shape[1], 2)])
            for i in range(0, grid.shape[0], 2)
        ]
    )


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3", "smolvlm"], indirect=True)
def test_average_of_each_tile(student):
    plain, changed = load(str(student)), load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    before, after = features(plain, 40, 24), features(changed, 40, 24)
    side = {"llava": 4}.get(plain.model.config.model_type, 2)
    tiles = before.reshape(-1, side, side, before.shape[-1])
    torch.testing.assert_close(after, torch.cat([blocks(tile).flatten(0, 1) for tile in tiles]))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"], indirect=True)
@pytest.mark.parametrize(("height", "width"), [(40, 40), (20, 40), (40, 20)])
def test_average_of_tiles_with_newline_tokens(student, height, width):
    """An overview of 4 x 4, then all tiles as one grid of which each row ends in a newline token."""
    plain, changed = load(str(student)), load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    before, after = features(plain, height, width), features(changed, height, width)
    rows, columns = height // families.PATCH, width // families.PATCH
    overview, tiles = before[:16].reshape(4, 4, -1), before[16:].reshape(rows, columns + 1, -1)
    newline = tiles[:1, -1:].expand(rows // 2, 1, -1)
    expected = torch.cat([blocks(tiles[:, :-1]), newline], dim=1)
    torch.testing.assert_close(after, torch.cat([blocks(overview).flatten(0, 1), expected.flatten(0, 1)]))


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_average_before_the_projector(student):
    """By its own number of tokens: nothing is saved that transformers does not know."""
    loaded = load(str(student))
    loaded.model = pooled(loaded.model, loaded.processor, 2)
    assert type(loaded.model).__module__.startswith("transformers.")
    assert (loaded.model.config.mm_tokens_per_image, loaded.model.config.vision_pool) == (1, 2)
    assert len(features(loaded, 24, 24)) == 1
    assert pooled(loaded.model, loaded.processor, 2) is loaded.model
    with pytest.raises(UsageError, match="averages 2 x 2 tokens already"):
        pooled(loaded.model, loaded.processor, 4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 40), (30, 30), (20, 20)])
def test_average_of_a_grid_of_any_sides(student, height, width):
    """With what windows at its edges hold; Qwen3's deepstack features are averaged as well."""
    plain, changed = load(str(student)), load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    picture = Image.open(io.BytesIO(tiny.png(3, height, width))).convert("RGB")
    inputs = plain.processor(text=["<|image_pad|>"], images=[picture], return_tensors="pt")
    ((_, rows, columns),) = (inputs["image_grid_thw"] // torch.tensor([1, 2, 2])).tolist()
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        before, after = (one.model.get_image_features(**given) for one in (plain, changed))

    def expected(one: torch.Tensor) -> torch.Tensor:
        grid = one.reshape(rows, columns, -1)
        windows = [grid[i : i + 2, j : j + 2] for i in range(0, rows, 2) for j in range(0, columns, 2)]
        return torch.stack([window.mean((0, 1)) for window in windows])

    torch.testing.assert_close(after.pooler_output[0], expected(before.pooler_output[0]))
    assert ("deepstack_features" in before) == (plain.model.config.model_type == "qwen3_vl")
    for layer, other in zip(before.get("deepstack_features", []), after.get("deepstack_features", []), strict=True):
        torch.testing.assert_close(other[0], expected(layer[0]))
    ids = changed.processor(text=["<|image_pad|>"], images=[picture], return_tensors="pt")["input_ids"]
    assert int((ids == changed.image_token_id).sum()) == len(after.pooler_output[0])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_positions_are_those_of_a_smaller_picture(student):
    """A picture of 4 x 3 tokens, averaged to 2 x 2, between two words: rows and columns count 0, 1, and the word behind
    them goes on from there."""
    changed = load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    picture = Image.open(io.BytesIO(tiny.png(3, 40, 30))).convert("RGB")
    inputs = changed.processor(text=["red <|image_pad|> blue"], images=[picture], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 6]]
    positions, _ = changed.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    assert positions[:, 0].tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_who_cannot_average_says_so(student):
    loaded = load(str(student))
    loaded.model.config.model_type = "another"
    with pytest.raises(ModelError, match="--vision-pool works on models of type llava, .*, not on 'another'"):
        pooled(loaded.model, loaded.processor, 2)


ALONE = """
import sys, torch
sys.modules["emkd"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, out = sys.argv[1:]
model, report = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
question = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "what is that"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits
said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
torch.save({"inputs": dict(inputs), "logits": logits, "said": said}, out)
"""


@pytest.mark.slow
def test_by_commands(family, teacher, student, data, tmp_path, capfd):
    """What a user types: the job on Ray, training that stops and goes on, and a student that answers without emkd."""
    call("cache-teacher", "--teacher", teacher, "--data", data, "--cache", tmp_path / "cache", "--gpus-per-worker", 0)
    call("inspect", tmp_path / "cache")
    assert f"{len(ROWS)} samples" in capfd.readouterr().out
    (tmp_path / "recipe.yaml").write_text("training: {max_steps: 2, save_steps: 1, learning_rate: 0.001}")
    train = ["train-student", "--student", student, "--data", data, "--cache", tmp_path / "cache", "--batch-size", 2]
    train += ["--recipe", tmp_path / "recipe.yaml", "--vision-pool", 2]
    call(*train, "--output", tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    shutil.copy(tmp_path / "out" / "run.json", tmp_path / "again")
    call(*train, "--output", tmp_path / "again", "--resume")
    trained, again = (load(str(tmp_path / name)) for name in ("out", "again"))
    begun = load(str(student)).model.state_dict()
    weights = trained.model.state_dict()
    assert all(torch.equal(weight, again.model.state_dict()[name]) for name, weight in weights.items())
    assert any(not torch.equal(weight, begun[name]) for name, weight in weights.items())
    (tmp_path / "picture.png").write_bytes(tiny.png(5, 24, 50))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", tmp_path / "alone.pt"], capture_output=True, text=True,
        timeout=240, check=False, cwd=tmp_path, env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "alone.pt")
    with torch.no_grad():
        assert torch.equal(alone["logits"], trained.model(**alone["inputs"]).logits)
    assert torch.equal(alone["said"], trained.model.generate(**alone["inputs"], max_new_tokens=3, do_sample=False))


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert not left.value.code


class Silent:
    """A processor that does not say which text it replaced."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **given: Any) -> dict[str, Any]:
        return {n: v for n, v in self._processor(**given).items() if n != "text_replacement_offsets"}


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_processor_that_lacks_what_is_needed_is_refused(student, data):
    loaded = load(str(student))
    encoder = Encoder(Silent(loaded.processor), loaded.image_token_id)
    assert encoder(Dataset(str(data)).sample(5)).n_vision == 0
    with pytest.raises(ModelError, match="Silent does not say by which text it replaced an image's placeholder"):
        encoder(Dataset(str(data)).sample(0))
