import pytest
import torch
from tokenizers.processors import TemplateProcessing

from emkd.errors import SampleError
from emkd.samples import Dataset
from emkd.samples.encode import Encoder, render
from tests import tiny
from tests.trainer import dense

PROCESSOR = tiny.new_processor()
IMAGE = 2


def encoder(**options: object) -> Encoder:
    return Encoder(PROCESSOR, IMAGE, **options)


def test_ids_and_answers_are_what_the_template_says(tmp_path):
    """Against ids written down from the rows themselves, without offsets or prefixes."""
    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet")))
    for number, row in enumerate(tiny.rows()):
        found = encoder()(dataset.sample(number))
        prompt = dense.prompt_of(row, PROCESSOR.tokenizer)
        text = [(t, a) for t, a in zip(prompt.ids, prompt.answer, strict=True) if t != IMAGE]
        assert found.text_ids.tolist() == [t for t, _ in text]
        assert found.answer_positions.tolist() == [n for n, (_, a) in enumerate(text) if a]
        assert found.n_vision == 16 * len(row["images"])
        ids = found.inputs["input_ids"][0]
        assert torch.equal(ids[found.text_positions], found.text_ids)
        assert torch.equal(ids[found.predicting_positions + 1], found.text_ids[found.answer_positions])


def test_each_answer_has_its_end_token(tmp_path):
    found = encoder()(Dataset(str(tiny.write_data(tmp_path / "rows.parquet"))).sample(3))
    words = PROCESSOR.tokenizer.convert_ids_to_tokens(found.text_ids[found.answer_positions])
    assert words == ["cat", "<end>", "yes", "and", "red", "<end>"]


def test_image_spans(tmp_path):
    found = encoder()(Dataset(str(tiny.write_data(tmp_path / "rows.parquet"))).sample(4))
    first, second = found.images
    assert (first.start, first.count, second.start, second.count) == (0, 16, 16, 16)
    assert first.grids == second.grids == ((4, 4),)
    assert first.original_size == (24, 24)
    text = PROCESSOR.tokenizer.convert_ids_to_tokens(found.text_ids)
    assert text[: first.text_position] == ["user:", "what", "is"]
    assert text[second.text_position - 2 : second.text_position] == ["user:", "and"]


def test_no_images_at_all(tmp_path):
    found = encoder()(Dataset(str(tiny.write_data(tmp_path / "rows.parquet"))).sample(2))
    assert found.images == ()
    assert found.n_vision == 0
    assert "pixel_values" not in found.inputs


def sample(tmp_path, messages, images=()):
    row = {"id": "x", "images": list(images), "messages": messages}
    return Dataset(str(tiny.write_data(tmp_path / "x.parquet", [row]))).sample(0)


def test_refusals(tmp_path):
    question, answer = tiny.turn("user", "<image> what"), tiny.turn("assistant", "cat")
    picture = [tiny.png(1)]
    with pytest.raises(SampleError, match="no-answer: the conversation has no assistant turn"):
        encoder()(sample(tmp_path, [question], picture))
    bare = tiny.new_processor()
    bare.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] + ' ' }}{% endfor %}"
    with pytest.raises(SampleError, match="no-prompt: the answer starts at the first token"):
        Encoder(bare, IMAGE)(sample(tmp_path, [answer]))
    with pytest.raises(SampleError, match="too-long: 21 tokens, --max-length is 20"):
        encoder(max_length=20)(sample(tmp_path, [question, answer], picture))
    assert encoder(max_length=21)(sample(tmp_path, [question, answer], picture)).n_tokens == 21


def test_the_models_own_placeholder_in_a_text_is_refused(tmp_path):
    """Parts of type text are not searched for marks, so this mark reaches the template unchanged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is <image>"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "cat"}]}]
    pq.write_table(
        pa.Table.from_pylist([{"images": [{"bytes": tiny.png(1)}], "messages": messages}]), tmp_path / "p.parquet"
    )
    with pytest.raises(SampleError, match="image-placeholders: the rendered prompt has 2 times '<image>' for 1 images"):
        encoder()(Dataset(str(tmp_path / "p.parquet")).sample(0))


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    processor = tiny.new_processor()
    processor.chat_template = "{{ messages|length }} " + tiny.TEMPLATE
    turns = sample(tmp_path, [tiny.turn("user", "what"), tiny.turn("assistant", "cat")]).turns
    with pytest.raises(SampleError, match="template-prefix"):
        render(processor, turns)


def test_an_answer_that_shares_a_token_with_the_prompt_is_refused(tmp_path):
    processor = tiny.new_processor()
    processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(SampleError, match="the token 'whatcat' belongs to an answer only in part"):
        Encoder(processor, IMAGE)(sample(tmp_path, [tiny.turn("user", "what"), tiny.turn("assistant", "cat")]))


def test_a_begin_token_is_no_part_of_an_image(tmp_path):
    """The token has no characters, and its offset is the start of an image's characters."""
    processor = tiny.new_processor()
    processor.chat_template = processor.tokenizer.chat_template = (
        tiny.TEMPLATE.replace("{{ m['role'] }}:", "{{ 'assistant:' if m['role'] == 'assistant' else '' }}")
    ).replace("' <image>'", "'<image>'")
    begin = processor.tokenizer.convert_tokens_to_ids("<end>")
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", begin)]
    )
    rows = [{**tiny.rows()[0], "messages": [tiny.turn("user", "<image> what"), tiny.turn("assistant", "red")]}]
    found = Encoder(processor, IMAGE)(Dataset(str(tiny.write_data(tmp_path / "rows.parquet", rows))).sample(0))
    assert found.text_ids[0] == begin
    assert not found.in_image.any()


def test_less_of_the_text(tmp_path):
    found = encoder()(Dataset(str(tiny.write_data(tmp_path / "rows.parquet"))).sample(4))
    kept = torch.tensor(range(2, len(found.text_ids)))
    less = found.with_text(kept)
    assert torch.equal(less.text_ids, found.text_ids[2:])
    assert torch.equal(less.text_ids[less.answer_positions], found.text_ids[found.answer_positions])
    moved = [max(0, span.text_position - 2) for span in found.images]
    assert [span.text_position for span in less.images] == moved
    assert moved != [span.text_position for span in found.images]
