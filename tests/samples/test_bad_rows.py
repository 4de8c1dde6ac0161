"""A bad row never affects another row: a dataset with a bad row of each kind, and good rows between them."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
)

from emkd.errors import SampleError
from emkd.samples import Dataset, Sample
from emkd.samples.conversation import parse_turns
from emkd.samples.encode import Encoded, Encoder
from emkd.samples.render import MAX_TURNS
from tests import tiny

IMAGE = 2
ALTERNATE = (
    "{% for m in messages[1:] %}{% if m['role'] == messages[loop.index0]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chat(*texts: Any) -> list[dict[str, Any]]:
    """Turns of the user and the assistant, one after the other."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


ASK = chat("<image> what is that", "red cat")
ORDINARY = saved(Image.new("RGB", (8, 6), (200, 100, 50)))
FRAMES = [Image.new("L", (4, 4), 9 * n) for n in range(3)]

# name -> bytes of the file (or what makes it at its path) of a row that asks about one picture, and its reason
PICTURES: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "cmyk": (saved(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "JPEG"), ""),
    "transparent": (saved(Image.new("RGBA", (8, 6), (1, 2, 3, 0))), ""),
    "palette": (saved(Image.new("P", (8, 6)), transparency=b"\0\1"), ""),
    "sixteen bits": (saved(Image.fromarray(np.full((6, 8), 30_000, np.uint16))), ""),
    "one pixel": (saved(Image.new("RGB", (1, 1))), ""),
    "inner link": (lambda path: path.symlink_to(path.parent / "good.png"), ""),
    "absent": (lambda path: None, "image-missing"),
    "folder": (lambda path: path.mkdir(), "image-missing"),
    "pipe": (lambda path: os.mkfifo(path), "image-missing"),
    "loop": (lambda path: path.symlink_to(path), "image-missing"),
    "outer link": (lambda path: path.symlink_to(path.parent.parent / "secret.png"), "image-outside-root"),
    "sparse": (lambda path: (path.write_bytes(b""), os.truncate(path, 1 << 40)), "image-too-large"),
    "empty": (b"", "image-broken"),
    "truncated": (ORDINARY[:-30], "image-broken"),
    "zero width": (b"P6 0 4 255\n", "image-broken"),
    "animated": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "image-animated"),
    "bomb": (saved(Image.new("1", (20_000, 20_000))), "image-too-large"),
    "float": (saved(Image.new("F", (8, 6)), "TIFF"), "image-depth"),
    "ribbon": (saved(Image.new("RGB", (1, 400))), "processor-error"),
}

PLACEHOLDER = chat([{"type": "image"}, {"type": "text", "text": "what is <image>"}], "red cat")

# rows as they are, and their reasons
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "text only": ({"messages": chat("what", "cat")}, ""),
    "null images": ({"images": None, "messages": chat("what", "cat")}, ""),
    "a blank answer among others": ({"messages": chat("what", "cat", "and", " ")}, ""),
    "absolute": ({"image": "/etc/hostname", "messages": ASK}, "image-outside-root"),
    "upwards": ({"image": "../secret.png", "messages": ASK}, "image-outside-root"),
    "link in the middle": ({"image": "sub/secret.png", "messages": ASK}, "image-outside-root"),
    "null image": ({"images": [None], "messages": ASK}, "image-missing"),
    "below a file": ({"image": "good.png/x.png", "messages": ASK}, "image-missing"),
    "endless name": ({"image": "x" * 5000, "messages": ASK}, "image-missing"),
    "no text": ({"image": "good.png", "messages": None}, "no-messages"),
    "no messages": ({"image": "good.png", "messages": []}, "no-messages"),
    "null content": ({"messages": chat(None, "cat")}, "bad-content"),
    "null part": ({"messages": chat([{"type": "text", "text": None}], "cat")}, "bad-content"),
    "surrogate": ({"id": "\ud800", "messages": chat("\ud800", "cat")}, "bad-content"),
    "stranger": ({"messages": [{"role": "wizard", "content": "x"}]}, "bad-role"),
    "fewer images": ({"images": ["good.png"], "messages": chat("<image> and <image>", "cat")}, "image-count"),
    "more images": ({"images": ["good.png"] * 2, "messages": ASK}, "image-count"),
    "own placeholder": ({"image": "good.png", "messages": PLACEHOLDER}, "image-placeholders"),
    "placeholder said": ({"messages": chat("what", [{"type": "text", "text": "<image>"}])}, "image-placeholders"),
    "image in an answer": ({"image": "good.png", "messages": chat("what", "red <image> cat")}, "image-in-answer"),
    "image part in an answer": (
        {"image": "good.png", "messages": chat("what", [{"type": "image"}])},
        "image-in-answer",
    ),
    "system only": ({"messages": [{"role": "system", "content": "is"}]}, "no-answer"),
    "question only": ({"image": "good.png", "messages": ASK[:1]}, "no-answer"),
    "empty answer": ({"messages": chat("what", "")}, "no-answer"),
    "empty parts": ({"messages": chat("what", [])}, "no-answer"),
    "white answer": ({"messages": chat("what", " \n\t ")}, "no-answer"),
    "answer first": ({"messages": chat("what", "cat")[1:]}, ""),  # its header predicts it
    "same role twice": ({"messages": chat("what", "cat") + chat("what", "cat")[1:]}, "template-error"),
    "long": ({"image": "good.png", "messages": chat("<image>" + " what" * 200, "cat")}, "too-long"),
    "endless": ({"messages": chat("what", "cat") * 5000}, "too-long"),
}


class Narrow(SiglipImageProcessor):
    """Refuses a ribbon, as Qwen2-VL's does."""

    def preprocess(self, images: Any, *args: Any, **options: Any) -> Any:
        for image in images:
            if max(image.size) > 200 * min(image.size):
                raise ValueError(f"absolute aspect ratio must be smaller than 200, got {image.size}")
        return super().preprocess(images, *args, **options)


@pytest.fixture
def encoder() -> Encoder:
    processor = tiny.new_processor()
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    processor.image_processor = Narrow(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.chat_template = ALTERNATE + tiny.TEMPLATE
    return Encoder(processor, IMAGE, max_length=100)


def write_rows(root: Path) -> list[tuple[str, dict[str, Any], str]]:
    """(name, row, reason) of each row, and the files that they name."""
    root.mkdir()
    (root / "good.png").write_bytes(ORDINARY)
    (root.parent / "secret.png").write_bytes(ORDINARY)
    (root / "sub").symlink_to(root.parent)
    found = []
    for name, (made, reason) in PICTURES.items():
        path = root / f"{name}.picture"
        path.write_bytes(made) if isinstance(made, bytes) else made(path)
        found.append((name, {"id": name, "image": path.name, "messages": ASK}, reason))
    return found + [(name, {"id": name, **row}, reason) for name, (row, reason) in ROWS.items()]


def outcome(dataset: Dataset, row: int, encoder: Encoder) -> Encoded | str:
    try:
        return encoder(dataset.sample(row))
    except SampleError as error:
        (error.detail + dataset.row(row).id).encode()  # the index stores both, as UTF-8
        return error.reason if error.detail else "no detail"


def assert_same(one: Encoded, other: Encoded) -> None:
    assert one.key == other.key
    assert one.images == other.images
    assert one.inputs.keys() == other.inputs.keys()
    for name, tensor in one.inputs.items():
        assert torch.equal(tensor, other.inputs[name]), name
    assert torch.equal(one.answer_positions, other.answer_positions)


@pytest.mark.timeout(60)  # a pipe that is opened, or ten thousand turns rendered one by one
def test_each_bad_row_is_skipped_and_costs_no_other(tmp_path, encoder):
    rows = write_rows(tmp_path / "root")
    good = {"id": "good", "image": "good.png", "messages": ASK}
    mixed = [row for _, bad, _ in rows for row in (good, bad)]
    expected = {name: reason for name, _, reason in rows}
    usable = [good, *(row for name, row, reason in rows if not reason)]
    for name, content in (("mixed", mixed), ("usable", usable)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    dataset = Dataset(str(tmp_path / "mixed.json"), tmp_path / "root")
    alone = Dataset(str(tmp_path / "usable.json"), tmp_path / "root")

    found = [outcome(dataset, row, encoder) for row in range(dataset.n_rows)]
    reasons = {name: x if isinstance(x, str) else "" for (name, _, _), x in zip(rows, found[1::2], strict=True)}
    assert reasons == expected
    references = [encoder(alone.sample(row)) for row in range(alone.n_rows)]
    for item in found[::2]:
        assert_same(item, references[0])
    for item, reference in zip([x for x in found[1::2] if isinstance(x, Encoded)], references[1:], strict=True):
        assert_same(item, reference)


def sample(messages: list[dict[str, Any]], *images: bytes) -> Sample:
    return Sample(row=0, id="", key="k", turns=parse_turns(messages), images=images)


def test_a_long_conversation_is_refused_with_both_numbers(encoder):
    with pytest.raises(SampleError, match="too-long: 10[0-9] tokens, --max-length is 100"):
        encoder(sample(chat(" what" * 100, "cat")))


def test_conversations_of_very_many_turns_are_refused_where_each_is_rendered_alone():
    unlimited = Encoder(tiny.new_processor(), IMAGE)
    with pytest.raises(SampleError, match=f"too-long: 10000 turns, at most {MAX_TURNS} without generation marks"):
        unlimited(sample(chat("what", "cat") * 5000))
    marked = tiny.new_processor()
    marked.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ p['text'] }} <end>{% endgeneration %}{% else %}{{ p['text'] }} {% endif %}"
        "{% endfor %}{{ '\n' }}{% endfor %}"
    )
    assert len(Encoder(marked, IMAGE)(sample(chat("what", "cat") * 5000)).answer_positions) == 2 * 5000


def test_a_template_may_raise_anything(encoder):
    encoder.processor.chat_template = "{{ messages[0]['content'][0]['text'].index('x') }}" + tiny.TEMPLATE
    with pytest.raises(SampleError, match="template-error: .*substring not found"):
        encoder(sample(chat("what", "cat")))


@pytest.mark.parametrize("raised", [OSError, MemoryError])
def test_what_is_not_the_rows_fault_is_raised_as_it_is(encoder, raised, monkeypatch):
    def preprocess(*args: Any, **options: Any) -> None:
        raise raised("the machine")

    monkeypatch.setattr(Narrow, "preprocess", preprocess)
    with pytest.raises(raised, match="the machine"):
        encoder(sample(ASK, ORDINARY))


# ---- small and narrow pictures


@pytest.mark.parametrize(
    "kind", [SiglipImageProcessor, SiglipImageProcessorPil, CLIPImageProcessor, CLIPImageProcessorPil]
)
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 1), (3, 5), (5, 3), (1, 100), (100, 1), (3, 4), (4, 3)])
def test_channels_of_small_pictures_are_not_mixed_up(kind, size):
    """An image of one colour keeps it at each size, with 1 or 3 pixels along either axis."""
    processor = tiny.new_processor()
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    processor.image_processor = kind(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False)
    colour = (250, 100, 20)
    pixels = Encoder(processor, IMAGE)(sample(ASK, saved(Image.new("RGB", size, colour)))).inputs["pixel_values"]
    expected = (torch.tensor(colour) / 255 - 0.5) / 0.5
    assert pixels.shape == (1, 3, tiny.SIDE, tiny.SIDE)
    torch.testing.assert_close(pixels, expected[None, :, None, None].expand_as(pixels), atol=0.01, rtol=0)


def test_the_limit_that_stands_for_processor_errors_is_a_real_one():
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        Qwen2VLImageProcessor()(images=[Image.new("RGB", (1, 400))], return_tensors="pt")


# ---- Parquet


def test_rows_of_parquet_without_images(tmp_path):
    messages = [tiny.turn("user", "what"), tiny.turn("assistant", "cat")]
    asking = [tiny.turn("user", "<image> what"), tiny.turn("assistant", "cat")]
    rows = [
        {"images": None, "messages": messages},
        {"images": None, "messages": asking},
        {"images": [None], "messages": asking},
        {"images": [{"bytes": None, "path": None}], "messages": asking},
        {"images": [{"bytes": b"", "path": None}], "messages": asking},
        {"images": [], "messages": None},
        {"images": [], "messages": [None]},
        {"images": [], "messages": [{"role": None, "content": None}]},
        {"images": [{"bytes": tiny.png(1), "path": None}], "messages": asking},
    ]
    pq.write_table(pa.Table.from_pylist(rows, tiny.SCHEMA), tmp_path / "rows.parquet")
    dataset, encoder = Dataset(str(tmp_path / "rows.parquet")), Encoder(tiny.new_processor(), IMAGE)
    found = [outcome(dataset, row, encoder) for row in range(dataset.n_rows)]
    assert [x if isinstance(x, str) else "" for x in found] == [
        "", "image-count", "image-missing", "image-missing", "image-broken", "no-messages", "bad-content", "bad-role", "",
    ]  # fmt: skip


def test_a_text_that_is_not_utf_8_costs_its_row_alone(tmp_path):
    """Parquet does not check its texts; writers in other languages do not, either."""
    path = tiny.write_data(tmp_path / "rows.parquet")
    whole = Dataset(str(path))
    before = [whole.sample(row) for row in range(6)]
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    assert data.count(b"what is that") == 1
    path.write_bytes(data.replace(b"what is that", b"what \xff\xfe that"))
    dataset = Dataset(str(path))
    with pytest.raises(SampleError, match="bad-content: the row has a text that is not valid UTF-8"):
        dataset.sample(1)
    assert (dataset.row(1).id, dataset.row(1).text_sha256) == ("", "")
    assert [dataset.sample(row) for row in (0, 2, 3, 4, 5)] == [before[row] for row in (0, 2, 3, 4, 5)]
