"""Small random checkpoints of ten families, saved with their real processors, for tests to load.

All share one vocabulary, word by word as in `tiny`, with the special tokens of all of them, so that any can be the
student of any. Pictures are of few pixels, and still become tiles, grids and newline tokens as large ones do.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split

from tests import tiny

SIDE, PATCH = 20, 5  # of a tile: 4 x 4 patches
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
LM_HEAD_ROWS = 128

SPECIALS = (
    *tiny.SPECIALS[:4],
    *("<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
# A run of newlines is one token, so that those of a text and those that a family writes around images become one.
NEWLINES = tuple("\n" * n for n in range(1, 7))
VOCABULARY = (*SPECIALS, *tiny.SPECIALS[4:], *tiny.WORDS, *NEWLINES)
ID = {word: number for number, word in enumerate(VOCABULARY)}

# What stands for an image in a chat template.
PLACEHOLDERS = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "glm4v": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3": "<start_of_image>",
}
# Tokens that a tokenizer names.
NAMED = {
    "qwen2_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen2_5_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen3_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "glm4v": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}


def tokenizer(family: str) -> hf.PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = Sequence([Split(Regex(" +"), "removed"), Split(Regex("\n+"), "isolated")])
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        extra_special_tokens=NAMED.get(family, {"image_token": "<image>"}),
        chat_template=template(family),
    )


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ '\n' if m['role'] == 'user' else ' ' }}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{{ '\n' if p['type'] == 'image' }}{% endfor %}"
    "{{ ' <end>\n' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt else '' }}"
)


def template(family: str) -> str:
    return TEMPLATE.replace("<image>", PLACEHOLDERS.get(family, "<image>"))


def siglip(**changed: Any) -> hf.SiglipVisionConfig:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.SiglipVisionConfig(**settings, image_size=SIDE, patch_size=PATCH, vision_use_head=False, **changed)


def text_settings(hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": LM_HEAD_ROWS,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": ID["<end>"],
        "pad_token_id": ID["<pad>"],
    }


def qwen2(hidden: int) -> hf.Qwen2Config:
    return hf.Qwen2Config(**text_settings(hidden), tie_word_embeddings=False)


def llava(hidden: int) -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=siglip(),
        text_config=qwen2(hidden),
        image_token_index=ID["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pixels = hf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    return config, hf.LlavaProcessor(
        pixels, tokenizer("llava"), patch_size=PATCH, vision_feature_select_strategy="full"
    )


def llava_next(hidden: int) -> tuple[Any, Any]:
    config = hf.LlavaNextConfig(
        vision_config=siglip(),
        text_config=qwen2(hidden),
        image_token_index=ID["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
    )
    square = {"height": SIDE, "width": SIDE}
    pixels = hf.LlavaNextImageProcessor(size=square, crop_size=square, image_grid_pinpoints=PINPOINTS)
    return config, hf.LlavaNextProcessor(
        pixels, tokenizer("llava_next"), patch_size=PATCH, vision_feature_select_strategy="full"
    )


def llava_onevision(hidden: int) -> tuple[Any, Any]:
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=qwen2(hidden),
        image_token_index=ID["<image>"],
        video_token_index=ID["<video>"],
        image_grid_pinpoints=PINPOINTS,
    )
    square = {"height": SIDE, "width": SIDE}
    return config, hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS),
        tokenizer("llava_onevision"),
        hf.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )


def qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": ID["<|image_pad|>"],
        "video_token_id": ID["<|video_pad|>"],
        "vision_start_token_id": ID["<|vision_start|>"],
        "vision_end_token_id": ID["<|vision_end|>"],
    }


def qwen_pixels() -> dict[str, Any]:
    edges = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (8 * PATCH) ** 2}  # areas, in spite of their names
    return {"patch_size": PATCH, "merge_size": 2, "size": edges}


def mrope(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}


def qwen2_vl(hidden: int) -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    text = {**text_settings(hidden), "rope_parameters": mrope(sections(hidden // 2))}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text, **qwen_ids())
    return config, hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(**qwen_pixels()), tokenizer("qwen2_vl"), hf.Qwen2VLVideoProcessor(**qwen_pixels())
    )


def sections(head: int) -> list[int]:
    """How the frequencies of a head are shared by time, height and width."""
    third = head // 2 // 3
    return [head // 2 - 2 * third, third, third]


def qwen2_5_vl(hidden: int) -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
    }
    text = {**text_settings(hidden), "rope_parameters": mrope(sections(hidden // 2))}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **qwen_ids())
    return config, hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**qwen_pixels()), tokenizer("qwen2_5_vl"), hf.Qwen2VLVideoProcessor(**qwen_pixels())
    )


def qwen3_vl(hidden: int) -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": PATCH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = {**text_settings(hidden), "head_dim": 16, "rope_parameters": mrope(sections(16))}
    del text["bos_token_id"], text["eos_token_id"]
    config = hf.Qwen3VLConfig(vision_config=vision, text_config=text, **qwen_ids())
    return config, hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**qwen_pixels()), tokenizer("qwen3_vl"), hf.Qwen3VLVideoProcessor(**qwen_pixels())
    )


def internvl(hidden: int) -> tuple[Any, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
    }
    tokens = (SIDE // PATCH // 2) ** 2
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=qwen2(hidden),
        image_token_id=ID["<IMG_CONTEXT>"],
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    square = {"height": SIDE, "width": SIDE}
    return config, hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer("internvl"),
        hf.InternVLVideoProcessor(size=square),
        image_seq_length=tokens,
    )


def idefics(hidden: int, config_of: Any, vision_of: Any) -> Any:
    vision = vision_of(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = hf.LlamaConfig(**text_settings(hidden), tie_word_embeddings=False)
    return config_of(vision_config=vision, text_config=text, image_token_id=ID["<image>"], scale_factor=2)


IDEFICS_PIXELS: dict[str, Any] = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def idefics3(hidden: int) -> tuple[Any, Any]:
    config = idefics(hidden, hf.Idefics3Config, hf.models.idefics3.configuration_idefics3.Idefics3VisionConfig)
    pixels = hf.Idefics3ImageProcessor(**IDEFICS_PIXELS)
    return config, hf.Idefics3Processor(pixels, tokenizer("idefics3"), image_seq_len=(SIDE // PATCH // 2) ** 2)


def smolvlm(hidden: int) -> tuple[Any, Any]:
    config = idefics(hidden, hf.SmolVLMConfig, hf.SmolVLMVisionConfig)
    return config, hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**IDEFICS_PIXELS),
        tokenizer("smolvlm"),
        hf.SmolVLMVideoProcessor(**IDEFICS_PIXELS),
        image_seq_len=(SIDE // PATCH // 2) ** 2,
    )


def gemma3(hidden: int) -> tuple[Any, Any]:
    text = {**text_settings(hidden), "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    tokens = (SIDE // PATCH // 2) ** 2
    config = hf.Gemma3Config(
        vision_config=siglip(),
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False},
        mm_tokens_per_image=tokens,
        boi_token_index=ID["<start_of_image>"],
        eoi_token_index=ID["<end_of_image>"],
        image_token_index=ID["<image_soft_token>"],
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    pixels = hf.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return config, hf.Gemma3Processor(pixels, tokenizer("gemma3"), image_seq_length=tokens)


FAMILIES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
}


def save(family: str, folder: Path, *, seed: int, hidden: int = 48) -> Path:
    """A checkpoint with random weights, through the family's public classes."""
    return write(*FAMILIES[family](hidden), folder, seed)


def write(config: Any, processor: Any, folder: Path, seed: int) -> Path:
    """A checkpoint with random weights of this config, and with this processor."""
    torch.manual_seed(seed)
    model: Any = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # towers start from noise that hardly tells one patch from another
        for name, weight in model.named_parameters():
            if "position_embedding" in name or "pos_embed" in name:
                weight.normal_()
    model.save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template
    processor.save_pretrained(folder)
    return folder
