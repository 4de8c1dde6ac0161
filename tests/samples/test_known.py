"""What a row has beyond what is read is never dropped unseen (FAULTS of kind A): small rows, and what becomes of them."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from emkd.errors import SampleError
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.samples.known import name_kind
from tests import tiny

A, B = tiny.png(1), tiny.png(2)
SAYS = [{"role": "user", "content": "what is that"}, {"role": "assistant", "content": "red cat"}]
ASKS = [{"role": "user", "content": "<image> what is that"}, {"role": "assistant", "content": "red cat"}]


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, SAYS[1]]


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def in_json(folder: Path, row: dict[str, Any]) -> Dataset:
    (folder / "a.png").write_bytes(A)
    (folder / "b.png").write_bytes(B)
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return Dataset(str(folder / "rows.jsonl"), folder)


def in_parquet(folder: Path, row: dict[str, Any]) -> Dataset:
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    return Dataset(str(folder / "rows.parquet"))


def refusal(dataset: Dataset) -> SampleError:
    with pytest.raises(SampleError) as error:
        dataset.sample(0)
    return error.value


LLAVA_VIDEO = [{"from": "human", "value": "<video>\nwhat is in this"}, {"from": "gpt", "value": "dog"}]


@pytest.mark.parametrize(
    ("row", "reason", "named"),
    [
        # FAULTS A, first row
        ({"id": "v1", "video": "a.mp4", "conversations": LLAVA_VIDEO}, "video", "'video'"),
        ({"id": "v1", "conversations": LLAVA_VIDEO}, "video", "'<video>'"),
        ({"audio": "a.wav", "messages": SAYS}, "audio", "'audio'"),
        ({"audio": {"array": [0.5], "sampling_rate": 8}, "messages": SAYS}, "audio", "'audio'"),
        ({"messages": user({"type": "video", "video": "a.mp4"}, text("what"))}, "video", "'video'"),
        ({"messages": user({"type": "input_audio", "input_audio": {"data": "x"}})}, "audio", "'input_audio'"),
        # second row
        ({"imgs": ["a.png"], "messages": SAYS}, "unread-image", "'imgs'"),
        ({"image_path": "x.png", "messages": SAYS}, "unread-image", "'image_path'"),
        ({"messages": [{**SAYS[0], "images": ["a.png"]}, SAYS[1]]}, "unread-image", "turn 0 has 'images'"),
        ({"pixel_values": [[0.5, 1]], "messages": SAYS}, "unread-image", "'pixel_values'"),
        ({"Image": "a.png", "messages": SAYS}, "unread-image", "'Image'"),
        ({"image_1": {"bytes": "x", "path": None}, "messages": SAYS}, "unread-image", "'image_1'"),
        ({"imageUrl": "https://x/a.png", "messages": SAYS}, "unread-image", "'imageUrl'"),
        ({"source": "coco/a.jpg", "messages": SAYS}, "unread-image", "'source'"),
        ({"metadata": {"file": "a.mp4"}, "messages": SAYS}, "video", "'metadata'"),
        ({"image_id": 33471, "messages": SAYS}, "unread-image", "'image_id'"),
        ({"image": "a.png", "image_path": "b.png", "messages": ASKS}, "unread-image", "'image_path'"),
        # third row
        ({"image": "a.png", "images": ["b.png"], "messages": ASKS}, "contradictory", "'images' and 'image'"),
        # fifth row
        (
            {"images": ["a.png"], "messages": user({"type": "image", "image": "b.png"}, text("what"))},
            "contradictory",
            "bring their own",
        ),
        # further members: what else would change what the row means or teaches
        ({"system": "say no", "messages": SAYS}, "unread-key", "'system'"),
        ({"tools": [{"name": "f"}], "messages": SAYS}, "unread-key", "'tools'"),
        ({"weight": 0, "messages": SAYS}, "unread-key", "'weight'"),
        ({"messages": [SAYS[0], {**SAYS[1], "reasoning_content": "is it red"}]}, "unread-key", "'reasoning_content'"),
        ({"messages": [SAYS[0], {**SAYS[1], "tool_calls": [{"name": "f"}]}]}, "unread-key", "'tool_calls'"),
        ({"messages": [{**SAYS[0], "value": "is it blue"}, SAYS[1]]}, "contradictory", "'content' and 'value'"),
        ({"messages": [{**SAYS[0], "from": "system"}, SAYS[1]]}, "contradictory", "'role' and 'from'"),
        ({"messages": SAYS, "conversations": ASKS}, "contradictory", "'messages' and 'conversations'"),
        ({"messages": user({"type": "image", "max_pixels": 4}), "image": "a.png"}, "unread-key", "'max_pixels'"),
        ({"messages": user({"type": "image", "text": "hi"}), "image": "a.png"}, "contradictory", "with a text"),
        ({"messages": user({"type": "text", "text": "hi", "image": "a.png"})}, "contradictory", "'image'"),
        ({"messages": user(text("Picture 1: <img>a.png</img> what"))}, "unread-image", "'<img>a.png</img>'"),
        ({"image": "a.png", "messages": user(text("<image_1> what"))}, "unread-image", "'<image_1>'"),
        ({"messages": user({"type": "image", "image": "a.png", "index": 0})}, "contradictory", "'index' and 'image'"),
        (
            {"images": ["a.png", "b.png"], "messages": user({"type": "image", "index": 1}, {"type": "image"})},
            "contradictory",
            "1 of 2 image parts have an index",
        ),
        ({"images": ["a.png"], "messages": user({"type": "image", "index": 1})}, "image-count", "[1]"),
        ({"messages": user({"type": "image", "index": True})}, "bad-content", "index True"),
        ({"messages": [SAYS[0], {**SAYS[1], "weight": 0.5}]}, "unread-key", "weight 0.5"),
        ({"messages": [SAYS[0], {**SAYS[1], "weight": 0, "loss": True}]}, "contradictory", "weight 0"),
        ({"messages": [{**SAYS[0], "train": True}, SAYS[1]]}, "unread-key", "only the assistant"),
    ],
)  # fmt: skip
def test_rows_that_mean_more_than_is_read_are_skipped_with_the_name(tmp_path, row, reason, named):
    error = refusal(in_json(tmp_path, row))
    assert error.reason == reason
    assert named in error.detail


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": {"bytes": b"x" * 99, "path": "a.mp4"}}, "video"),
        ({"thing": {"bytes": b"x" * 99}}, "unread-image"),
        ({"imgs": [A]}, "unread-image"),
        ({"image_id": 7}, "unread-image"),
        ({"where": "a/b.jpg"}, "unread-image"),
        ({"train": False}, "unread-key"),
    ],
)
def test_the_same_in_parquet_without_reading_every_column(tmp_path, row, reason):
    assert refusal(in_parquet(tmp_path, {**row, "messages": SAYS})).reason == reason


@pytest.mark.parametrize(
    "extra",
    [
        {"video": None, "imgs": [], "audio": {"bytes": None, "path": None}, "system": "", "pixel_values": [[]]},
        {"image_size": [24, 24], "image_caption": "a cat", "num_images": 1, "video_fps": 2.0},
        {"source": "vqa", "score": 0.5, "weight": 1, "train": True, "metadata": {"split": "train"}},
    ],
)
def test_rows_with_harmless_columns_are_the_same_samples(tmp_path, extra):
    (tmp_path / "plain").mkdir()
    plain = in_json(tmp_path / "plain", {"image": "a.png", "messages": ASKS}).sample(0)
    assert in_json(tmp_path, {"image": "a.png", "messages": ASKS, **extra}).sample(0).key == plain.key
    row = {"image": {"bytes": A}, "messages": ASKS, **extra}
    assert in_parquet(tmp_path, row).sample(0).key == plain.key
    both = {"image": "a.png", "images": ["a.png"], "messages": ASKS, "conversations": ASKS}
    assert in_json(tmp_path, both).sample(0).key == plain.key
    if "video" in extra:  # in a row that has no picture as well
        assert in_json(tmp_path, {"messages": SAYS, **extra}).sample(0).images == ()


def test_provenance_of_a_picture_that_is_read_is_no_other_picture(tmp_path):
    row = {"image": "a.png", "url": "https://x/y.jpg", "image_id": 5, "messages": ASKS}
    assert in_json(tmp_path, row).sample(0).images == (A,)
    html = [{"role": "user", "content": "what does <video> do in <video></video>"}, SAYS[1]]
    assert in_json(tmp_path, {"messages": html}).sample(0).turns[0].parts == (html[0]["content"],)


def test_names_of_media():
    media = ("video", "videos", "audio_path", "imgs", "image_path", "imagePath", "image-url", "img2", "pixel_values")
    assert [name for name in media if name_kind(name) is None] == []
    other = ("image_size", "num_images", "picked", "gifted", "imagine", "video_fps", "id", "source", "image_id", "epic")
    assert [name for name in other if name_kind(name) is not None] == []


def test_other_columns_are_told_once(tmp_path):
    part = {"type": "image", "detail": "low"}
    row = {"image": "a.png", "score": 1, "messages": [{"role": "user", "content": [part], "name": "x"}, SAYS[1]]}
    told = ": not read: messages[].content[].detail, messages[].name, score"
    (tmp_path / "parquet").mkdir()
    parquet = {**row, "image": {"bytes": A}, "messages": row["messages"][:1]}
    assert in_json(tmp_path, row).unread() == f"{tmp_path}/rows.jsonl{told}"
    assert in_parquet(tmp_path / "parquet", parquet).unread().endswith(told)
    (tmp_path / "plain").mkdir()
    assert in_json(tmp_path / "plain", {"id": 5, "image": "a.png", "messages": ASKS}).unread() is None


# ---- which picture goes where


def parts(*indices: int | None) -> list[dict[str, Any]]:
    return [{"type": "image", "index": index, "text": None} for index in indices]


def test_an_index_of_a_part_is_obeyed(tmp_path):
    """The layout of HuggingFaceH4's mixes: each part has all keys, with null for those of the other type."""
    asking = [*parts(1), {"type": "text", "text": "what is that", "index": None}, *parts(0)]
    row = {"images": [{"bytes": A}, {"bytes": B}], "messages": [{"role": "user", "content": asking}]}
    row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "cat", "index": None}]})
    assert in_parquet(tmp_path, row).sample(0).images == (B, A)
    in_order = {"images": ["b.png", "a.png"], "messages": [ASKS[0], SAYS[1]]}
    in_order["messages"] = [{"role": "user", "content": "<image>what is that<image>"}, tiny.turn("assistant", "cat")]
    assert in_json(tmp_path, in_order).sample(0).key == in_parquet(tmp_path, row).sample(0).key
    twice = {"images": ["a.png"], "messages": user(*parts(0, 0))}
    assert in_json(tmp_path, twice).sample(0).images == (A, A)


DATA_URI = "data:image/png;base64," + base64.b64encode(A).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"path": "a.png"}},
        {"type": "image", "url": "file://a.png"},
        {"type": "image_url", "image_url": {"url": DATA_URI}},
        {"type": "image_url", "image_url": DATA_URI, "text": None},
        {"type": "image", "image": base64.b64encode(A).decode()},
    ],
)
def test_a_part_may_bring_its_own_picture(tmp_path, part):
    plain = in_json(tmp_path, {"image": "a.png", "messages": ASKS}).sample(0)
    found = in_json(tmp_path, {"messages": user(part, text(" what is that"))}).sample(0)
    assert found.images == (A,)
    assert found.key == plain.key


# ---- what is learnt


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"train": False}, {"weight": 0.0, "loss": None}])
def test_turns_that_are_not_to_be_learnt_are_no_answers(tmp_path, flag):
    encoder = Encoder(tiny.new_processor(), 2)
    turns = [*SAYS, tiny.turn("user", "and that"), tiny.turn("assistant", "big dog")]
    marked = [turns[0], {**turns[1], **flag}, *turns[2:]]
    plain, found = (in_json(tmp_path, {"messages": m}).sample(0) for m in (turns, marked))
    items = [encoder(plain), encoder(found)]
    assert items[0].text_ids.tolist() == items[1].text_ids.tolist()
    said = [encoder.words(item.text_ids[item.answer_positions].tolist()) for item in items]
    assert said == ["red cat <end> big dog <end>", "big dog <end>"]
    assert plain.key != found.key, "a cache that learnt the turn has other answers"
    assert len({*in_json(tmp_path, {"messages": turns}).text_hashes(), in_json(tmp_path, {"messages": marked}).row(0).text_sha256}) == 2  # fmt: skip
    with pytest.raises(SampleError, match="no-answer: none of the assistant's turns is to be learnt"):
        encoder(in_json(tmp_path, {"messages": [SAYS[0], {**SAYS[1], **flag}]}).sample(0))


@pytest.mark.parametrize("ends", [True, False])
def test_the_same_with_generation_marks(tmp_path, ends):
    """With an end token after the marks, and for two answers that follow each other directly."""
    processor = tiny.new_processor()
    processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}" + ("{{ '<end> ' }}" if ends else "") +
        "{% else %}{{ 'user: ' + p['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    )  # fmt: skip
    encoder = Encoder(processor, 2)
    turns = [SAYS[0], {**SAYS[1], "loss": False}, tiny.turn("assistant", "big dog")]
    found = encoder(in_json(tmp_path, {"messages": turns}).sample(0))
    expected = "big dog <end>" if ends else "big dog"
    assert encoder.words(found.text_ids[found.answer_positions].tolist()) == expected


@pytest.mark.parametrize("system", ["", "system: is "])
@pytest.mark.parametrize("said", ["red cat", "X red", "Xq7", " red"])
def test_the_header_of_a_first_turn_is_no_answer(tmp_path, system, said):
    """A tokenizer that adds BOS, a template without generation marks, with and without a text before all turns."""
    processor = tiny.new_processor([*tiny.VOCABULARY, "X", "Xq7", "system:"])
    processor.chat_template = f"{{{{ '{system}' }}}}" + tiny.TEMPLATE
    begin = processor.tokenizer.convert_tokens_to_ids("<pad>")
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", begin)]
    )
    encoder = Encoder(processor, 2)
    turns = [tiny.turn("assistant", said), tiny.turn("user", "what"), tiny.turn("assistant", "big dog")]
    found = encoder(in_json(tmp_path, {"messages": turns}).sample(0))
    words = encoder.words(found.text_ids[found.answer_positions].tolist())
    assert words == f"{said.strip()} <end> big dog <end>"


# ---- details are one line


def test_details_are_one_line_whatever_a_row_has(tmp_path):
    strange = "\x1b[31m\n\u202e\u200b\ud800" + "x" * 9000
    for row in (
        {"messages": [{"role": strange, "content": "x"}]},
        {"messages": user({"type": strange})},
        {"image": strange, "messages": ASKS},
        {"image": "y" * 160_000, "messages": ASKS},
        {strange + ".mp4": "a.mp4", "messages": SAYS},
        {"messages": [{**SAYS[0], "weight": strange}, SAYS[1]]},
    ):
        dataset = in_json(tmp_path, {"id": strange, **row})
        detail = refusal(dataset).detail
        assert detail.isprintable()
        assert len(detail) <= 500
        assert dataset.row(0).id.isprintable()
        assert dataset.unread() is None or dataset.unread().isprintable()
