"""A LLaVA small enough to train from random weights on one CPU core, with its tokenizer and processors.

    new_tokenizer()          23 words: 4 specials, 8 questions, 11 answers
    new_processor(pads)      LlavaProcessor: a wide image -> 40×40 pixels -> 64 <image> tokens
    new_teacher(seed)        SigLIP tower, projector, Qwen2; 161,600 parameters, random
    new_student(teacher)     a copy of the teacher; training pools its vision tokens
    save_model(model, processor, folder)

The teacher's processor pads an image to a square, as that of LLaVA-1.5 does; the student's stretches it, as SigLIP's
own does. So the vision tokens of the two lie on different grids (places.py), as they often do if a student has another
vision tower than its teacher.

All classes are those of transformers, without overrides, so everything that works with these models works with a LLaVA
checkpoint of any size.

A conversation is rendered as "<image> b2? seven a1? empty ...": every word is one token, and no token marks the start
or the end of a turn. A new turn never changes the tokens before it.

Shape legend: d hidden size 64.
"""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from emkd.demo.scenes import ANSWERS, N_CELLS, QUESTIONS, WIDTH

IMAGE_TOKEN = "<image>"
SPECIALS = ("<pad>", "<unk>", "<eos>", IMAGE_TOKEN)
WORDS = (*SPECIALS, *QUESTIONS, *ANSWERS)

SIDE_PIXELS = WIDTH  # of the square that the models see
PATCH_PIXELS = 5
PATCHES_PER_SIDE = SIDE_PIXELS // PATCH_PIXELS
N_VISION_TOKENS = PATCHES_PER_SIDE**2
HIDDEN_SIZE = 64

# The space precedes a word instead of following it, so that a turn adds exactly its own word and a prompt ends with its
# last word. The template ignores `add_generation_prompt`, because no token announces an answer.
CHAT_TEMPLATE = """
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {{- ' ' + message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {{- '<image>' -}}
      {%- else -%}
        {{- ' ' + part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
"""


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word. It always splits off <image>, also in "<image>b2?"."""
    words = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_processor(*, pads: bool) -> LlavaProcessor:
    """Return a processor that makes pixels in [-1, 1] at 40×40 and writes one <image> token for each patch.

    pads: grey above and below; otherwise the image is stretched
    """
    settings: dict[str, Any] = {
        "size": {"height": SIDE_PIXELS, "width": SIDE_PIXELS},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    image_processor: LlavaImageProcessorPil | SiglipImageProcessor
    if pads:
        image_processor = LlavaImageProcessorPil(do_center_crop=False, do_pad=True, **settings)
    else:
        image_processor = SiglipImageProcessor(**settings)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=new_tokenizer(),
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def teacher_config() -> LlavaConfig:
    """Return the configuration of the whole model. LLaVA reads the tower's last layer, before SigLIP's final norm."""
    vision = SiglipVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE_PIXELS,
        patch_size=PATCH_PIXELS,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * (N_VISION_TOKENS + 2 * N_CELLS),
        initializer_range=0.1,  # near 1/√d; the usual 0.02 suits widths of thousands
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=WORDS.index("<eos>"),
        pad_token_id=WORDS.index("<pad>"),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS.index(IMAGE_TOKEN),  # read as `image_token_id`
        image_seq_length=N_VISION_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def new_teacher(seed: int) -> LlavaForConditionalGeneration:
    """Return a model with random weights from the seed. The caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(teacher_config())
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():  # SigLIP initialises positions with weak noise, but every question depends on a position
        positions.copy_(sine_positions(PATCHES_PER_SIDE, HIDDEN_SIZE))
    return model.eval()


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Return positions [side², width]: sines and cosines of the row in the first half, of the column in the second.

    Wavelengths range from 4 to 4·side patches, so that both neighbours and opposite ends differ.
    """
    waves = 4 * side ** torch.linspace(0, 1, width // 4)
    angles = 2 * math.pi * torch.arange(side)[:, None] / waves
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = along.repeat_interleave(side, dim=0), along.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def new_student(teacher: LlavaForConditionalGeneration, seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a separate model with the teacher's tower, projector and language model, and all vision tokens.

    seed: of weights that the teacher does not have; a copy has none
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = LlavaForConditionalGeneration(LlavaConfig.from_dict(teacher.config.to_dict()))
    student.load_state_dict(teacher.state_dict())
    return student.eval()


def save_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save weights (safetensors), configuration, tokenizer and processor, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
