"""Families that emkd was not written for, in the form of `tests.families`: five that meet its conditions, of which two
change logits after their head, and two that do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf

from tests.families import ID, PATCH, PINPOINTS, SIDE, llava, mrope, sections, siglip, text_settings, tokenizer, write


def aya_vision(hidden: int) -> tuple[Any, Any]:
    config = hf.AyaVisionConfig(
        vision_config=siglip(),
        text_config=hf.CohereConfig(**text_settings(hidden)),
        image_token_index=ID["<image>"],
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    square = {"height": SIDE, "width": SIDE}
    return config, hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer("aya_vision"),
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        image_token="<image>",
        start_of_img_token="<img>",
        end_of_img_token="</img>",
        img_patch_token="<image>",
        img_line_break_token="<video>",
        tile_token="<fake_token_around_image>",
        tile_global_token="<global-img>",
    )


def mistral3(hidden: int) -> tuple[Any, Any]:
    """Pictures of any size; each row of vision tokens ends in a text token."""
    vision = hf.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=3 * SIDE,
        patch_size=PATCH,
    )
    text = hf.MistralConfig(**text_settings(hidden), head_dim=16)
    config = hf.Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=ID["<image>"], spatial_merge_size=2
    )
    return config, hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 3 * SIDE}, patch_size=PATCH),
        tokenizer("mistral3"),
        patch_size=PATCH,
        spatial_merge_size=2,
        image_token="<image>",
        image_break_token="<img>",
        image_end_token="</img>",
    )


def glm4v(hidden: int) -> tuple[Any, Any]:
    """M-RoPE, as the Qwens."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": PATCH,
        "image_size": 2 * SIDE,
    }
    rope = {**mrope(sections(hidden // 2)), "partial_rotary_factor": 1.0}
    config = hf.Glm4vConfig(
        vision_config=vision,
        text_config={**text_settings(hidden), "rope_parameters": rope},
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        image_start_token_id=ID["<|vision_start|>"],
        image_end_token_id=ID["<|vision_end|>"],
        video_start_token_id=ID["<img>"],
        video_end_token_id=ID["</img>"],
    )
    areas = {"shortest_edge": 2 * (4 * PATCH) ** 2, "longest_edge": 2 * (8 * PATCH) ** 2}
    pixels: dict[str, Any] = {"patch_size": PATCH, "merge_size": 2, "size": areas}
    return config, hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(**pixels), tokenizer("glm4v"), hf.Glm4vVideoProcessor(**pixels)
    )


def mistral_large4(hidden: int, cap: float = 2.0) -> tuple[Any, Any]:
    """A softcap after the LM head; else Mistral 3 with experts."""
    base, processor = mistral3(hidden)
    text = {
        **text_settings(hidden),
        "num_key_value_heads": 2,
        "final_logit_softcapping": cap,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 64,
        "index_head_dim": 16,
        "index_n_heads": 2,
    }
    config = hf.MistralLarge4Config(
        vision_config=base.vision_config, text_config=text, image_token_index=ID["<image>"], spatial_merge_size=2
    )
    return config, processor


def granite4_vision(hidden: int, divisor: float = 3.0) -> tuple[Any, Any]:
    """Logits are divided after the LM head; else LLaVA-NeXT with other projectors, for several layers."""
    vision = {**siglip().to_dict(), "hidden_size": 64}
    qformer = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 8}
    config = hf.Granite4VisionConfig(
        vision_config=vision,
        text_config={**text_settings(hidden), "logits_scaling": divisor},
        qformer_config={**qformer, "max_position_embeddings": 64},
        image_token_index=ID["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1],
    )
    square = {"height": SIDE, "width": SIDE}
    return config, hf.Granite4VisionProcessor(
        hf.LlavaNextImageProcessor(size=square, crop_size=square, image_grid_pinpoints=PINPOINTS),
        tokenizer("granite4_vision"),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
    )


def paligemma(hidden: int) -> tuple[Any, Any]:
    """Its processor writes a begin token after the image and a newline after the text."""
    text = hf.GemmaConfig(**{**text_settings(hidden), "vocab_size": 1280}, head_dim=16)  # it adds 1152 tokens
    config = hf.PaliGemmaConfig(
        vision_config=siglip(), text_config=text, image_token_index=ID["<image>"], projection_dim=hidden
    )
    pixels: Any = hf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    pixels.image_seq_length = (SIDE // PATCH) ** 2
    words = tokenizer("paligemma")
    words.bos_token = "<pad>"
    return config, hf.PaliGemmaProcessor(pixels, words)


def both_directions(hidden: int) -> tuple[Any, Any]:
    """PaliGemma's model, whose prompt tokens attend to the whole prompt, with a processor that does not change
    texts."""
    return paligemma(hidden)[0], llava(hidden)[1]


Build = Callable[[int], tuple[Any, Any]]
WORK: dict[str, Build] = {
    "aya_vision": aya_vision,
    "mistral3": mistral3,
    "glm4v": glm4v,
    "mistral_large4": mistral_large4,
    "granite4_vision": granite4_vision,
}
REFUSED: dict[str, tuple[Build, str]] = {
    "paligemma": (paligemma, "PaliGemmaProcessor changes more of a text than its image placeholders"),
    "both_directions": (both_directions, "its attention is not causal"),
}


def save(build: Build, folder: Path, *, seed: int, hidden: int = 48) -> Path:
    """A checkpoint with random weights."""
    return write(*build(hidden), folder, seed)
