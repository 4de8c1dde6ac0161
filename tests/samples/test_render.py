"""Chat templates and tokenizers as real checkpoints have them: marks of what the assistant says, byte-level BPE,
SentencePiece-like pieces that carry the space before a word, a bos token."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from emkd.errors import SampleError
from emkd.samples.conversation import parse_turns
from emkd.samples.encode import Encoder
from emkd.samples.render import end_token, template_of
from emkd.samples.sample import Sample
from tests import tiny

CORPUS = ["USER: what is in the picture? ASSISTANT: a red cat. yes and no user assistant system big dog"] * 3

# As LLaVA-1.5 writes: roles in capitals, answers marked with the space after them, no end token.
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)
# As LLaVA-OneVision writes: a space after the role that its generation prompt does not have, an end token.
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image>' }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ '\n' + p['text'] }}{% endgeneration %}"
    "{% else %}{{ '\n' + p['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
# ChatML as Qwen writes it: no marks, a newline after the end token.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def pieces() -> PreTrainedTokenizerFast:
    """Like Llama's: "▁" for a space, before the word; a bos token that the tokenizer adds."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.pre_tokenizer = None
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<s>", "</s>", "<image>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    backend.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor_of(tokenizer: PreTrainedTokenizerFast, template: str):
    found = tiny.new_processor()
    found.tokenizer, found.chat_template = tokenizer, template
    found.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return found


def answers(tokenizer, template, messages, n_images=1) -> tuple[str, list[str]]:
    """(all text, answer tokens) of a conversation."""
    processor = processor_of(tokenizer, template)
    sample = Sample(
        row=0, id="", key="k", turns=parse_turns(messages), images=tuple(tiny.png(n) for n in range(n_images))
    )
    found = Encoder(processor, processor.image_token_id)(sample)
    assert found.n_vision == 16 * n_images
    ids = found.text_ids[found.answer_positions]
    return tokenizer.decode(found.text_ids), tokenizer.convert_ids_to_tokens(ids)


TWO = [
    tiny.turn("user", "<image>\nwhat is in the picture?"),
    tiny.turn("assistant", "a red cat."),
    tiny.turn("user", "yes and no?"),
    tiny.turn("assistant", "big\ndog"),
]


@pytest.mark.parametrize("messages", [TWO, TWO[:2]])
def test_llava_with_pieces(messages):
    text, found = answers(pieces(), LLAVA, messages)
    assert "".join(found) == "▁a▁red▁cat." + ("▁big<0x0A>dog" if messages is TWO else "")
    assert text.count("<s>") == 1, "the bos token stands once"


@pytest.mark.parametrize("template", [ONEVISION, CHATML])
@pytest.mark.parametrize("messages", [TWO, TWO[:2]])
def test_end_tokens_belong_to_answers_and_newlines_to_nobody(template, messages):
    _, found = answers(byte_level(), template, messages)
    text = "".join(found)
    assert text.startswith("aĠredĠcat.<|im_end|>")
    assert text.removeprefix("aĠredĠcat.<|im_end|>") == ("bigĊdog<|im_end|>" if messages is TWO else "")


def test_a_template_that_writes_bos_itself_gets_no_second_one():
    text, _ = answers(pieces(), "{{ bos_token }}" + LLAVA, TWO)
    assert text.count("<s>") == 1


def test_several_images_in_several_turns():
    messages = [*TWO[:2], tiny.turn("user", "<image> yes?"), tiny.turn("assistant", "no")]
    _, found = answers(byte_level(), ONEVISION, messages, n_images=2)
    assert "".join(found) == "aĠredĠcat.<|im_end|>no<|im_end|>"


PLAIN = (  # no marks; the header of a turn is not a special token
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else "
    "p['text'] }}{% endfor %}{{ eos_token + '\n' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ 'system: yes\n' }}{% endif %}"  # as Qwen's: a default system turn


@pytest.mark.parametrize(
    ("before", "tokenizer"), [("", pieces), ("{{ bos_token }}", pieces), (SYSTEM, byte_level), ("", byte_level)]
)
@pytest.mark.parametrize("first", ["a red cat.", " a red cat.", "Xq7", "9wv"])
def test_a_conversation_that_begins_with_the_assistant(before, tokenizer, first):
    """The answer begins behind the header, for a first turn as for any other."""
    made = tokenizer()
    found = {}
    for at, messages in enumerate(
        (
            [tiny.turn("assistant", first)],
            [tiny.turn("assistant", first), *TWO[2:]],
            [TWO[2], tiny.turn("assistant", first)],
        )
    ):
        _, found[at] = answers(made, before + PLAIN, messages, n_images=0)
    end = made.eos_token
    if "<0x" not in "".join(found[0]):  # bytes of a word that the tokenizer has not seen
        assert "".join(found[0]).replace("▁", " ").replace("Ġ", " ").strip() == first.strip() + end
    assert found[0] == found[2], "as behind a question"
    assert "".join(found[1]).startswith("".join(found[0]))
    assert "assistant" not in "".join(found[1])


def test_an_answer_that_nothing_precedes_cannot_be_predicted():
    bare = "{% for m in messages %}{{ m['content'][0]['text'] + eos_token }}{% endfor %}"
    with pytest.raises(SampleError, match="no-prompt: the answer starts at the first token"):
        answers(byte_level(), bare, [tiny.turn("assistant", "a red cat.")], n_images=0)


def test_end_tokens_are_looked_for():
    assert end_token(processor_of(pieces(), LLAVA)) is None
    assert end_token(processor_of(byte_level(), ONEVISION)) == "<|im_end|>"
    assert end_token(processor_of(byte_level(), CHATML)) == "<|im_end|>"


@pytest.mark.parametrize("template", [ONEVISION, CHATML])
def test_a_template_that_refuses_a_conversation_costs_that_row_alone(template):
    strict = (
        "{% if messages[-1]['role'] == messages[-2]['role'] %}{{ raise_exception('roles must alternate') }}{% endif %}"
    )
    messages = [*TWO[:2], tiny.turn("assistant", "again")]
    with pytest.raises(SampleError, match="template-error: .*roles must alternate"):
        answers(byte_level(), strict + template, messages)


def test_a_template_for_texts_alone_is_said():
    with pytest.raises(SampleError, match="template-error: .*concatenate"):
        answers(byte_level(), "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", TWO)


def test_of_several_templates_the_default_one_is_rendered():
    processor = processor_of(byte_level(), {"default": ONEVISION, "tools": LLAVA})
    assert template_of(processor) == ONEVISION
    assert answers(byte_level(), {"default": ONEVISION, "tools": LLAVA}, TWO) == answers(byte_level(), ONEVISION, TWO)
    assert template_of(processor_of(byte_level(), {"tools": LLAVA})) is None
