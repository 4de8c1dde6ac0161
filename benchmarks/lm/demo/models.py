"""A LLaVA around SmolLM2: a small SigLIP tower and a projector with random weights, and the language model's own.

All classes are those of transformers, so that what is saved is a checkpoint like any other.

A conversation is rendered as "<filename> Read f star Read a ...", where <filename> stands for the
picture: a token of the tokenizer that no text has. No token marks a turn, so that an answer is one token.

Shape legend: d width of the language model (576), T tokens.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from benchmarks.lm.demo.scenes import WIDTH
from benchmarks.lm.environment import MODEL, model_folder
from benchmarks.lm.language_model import load_language_model
from emkd.demo.models import CHAT_TEMPLATE, PATCHES_PER_SIDE, sine_positions
from emkd.demo.models import IMAGE_TOKEN as DEMO_IMAGE_TOKEN

IMAGE_TOKEN = "<filename>"
PATCH_PIXELS = WIDTH // PATCHES_PER_SIDE
TOWER_WIDTH = 128
TEMPLATE = CHAT_TEMPLATE.replace(DEMO_IMAGE_TOKEN, IMAGE_TOKEN)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Return the language model's tokenizer with the picture's token and the template."""
    whole = AutoTokenizer.from_pretrained(model_folder(), gguf_file=MODEL)
    return PreTrainedTokenizerFast(
        tokenizer_object=whole.backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def new_processor(tokenizer: PreTrainedTokenizerFast, *, pads: bool) -> LlavaProcessor:
    """Return a processor that makes 128 x 128 pixels and 64 vision tokens.

    pads: dark above and below; otherwise the picture is stretched
    """
    settings: dict[str, Any] = {
        "size": {"height": WIDTH, "width": WIDTH},
        "image_mean": [0.05] * 3,
        "image_std": [0.25] * 3,  # most pixels are dark: with 0.5, the tower learns ten times more slowly
    }
    pixels: LlavaImageProcessorPil | SiglipImageProcessor
    if pads:
        pixels = LlavaImageProcessorPil(do_center_crop=False, do_pad=True, **settings)
    else:
        pixels = SiglipImageProcessor(**settings)
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )


def new_teacher(tokenizer: PreTrainedTokenizerFast, layers: int, seed: int) -> LlavaForConditionalGeneration:
    """Return a LLaVA around the first layers of the language model; tower and projector are random, from the seed."""
    lm = load_language_model()
    lm.model.layers = lm.model.layers[:layers]
    lm.config.num_hidden_layers = layers
    vision = SiglipVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=2 * TOWER_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=WIDTH,
        patch_size=PATCH_PIXELS,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=lm.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=PATCHES_PER_SIDE**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.tie_weights()
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():  # SigLIP initialises positions with weak noise, but every question depends on a position
        positions.copy_(sine_positions(PATCHES_PER_SIDE, TOWER_WIDTH))
    return model.eval()


def save_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save a checkpoint as `from_pretrained` reads it."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
