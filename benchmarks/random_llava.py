"""LLaVAs of any size with random weights, and rows of noise for them. Nothing is downloaded.

A word is a token; the chat template is the demonstration's. Random weights cost what trained ones cost, but for the
assignment, whose time depends on the costs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from emkd.demo.models import CHAT_TEMPLATE, IMAGE_TOKEN, SPECIALS
from emkd.demo.scenes import SCHEMA
from emkd.vlm.loading import VisionLanguageModel
from emkd.vlm.pooling import pooled


@dataclass(frozen=True, kw_only=True)
class Text:
    """A Qwen2. rows: of the LM head; those beyond the ids of the tokenizer are padding"""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    rows: int
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A SigLIP that sees side x side pixels in patches of patch x patch."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    side: int
    patch: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """n_tokens: V, ids of the tokenizer;  pool: R of the windows that become one vision token"""

    text: Text
    tower: Tower
    n_tokens: int
    pool: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def n_vision(self) -> int:
        """Vision tokens of a picture."""
        return (self.tower.side // self.tower.patch // self.pool) ** 2


def random_model(shape: Shape, seed: int, device: str) -> VisionLanguageModel:
    """A model with its processor; the weights are functions of the seed and the kind of device."""
    processor = _processor(shape)
    torch.manual_seed(seed)
    with torch.device(device):  # weights of 7B are drawn where they stay
        model = AutoModelForImageTextToText.from_config(_config(shape), dtype=shape.dtype)
    with torch.no_grad():  # SigLIP starts from noise that hardly tells one patch from another
        model.model.vision_tower.embeddings.position_embedding.weight.normal_()
    model = pooled(model, processor, shape.pool)
    return VisionLanguageModel(path=Path("random"), model=model.eval(), processor=processor, n_tokens=shape.n_tokens)


def _config(shape: Shape) -> LlavaConfig:
    text, tower = shape.text, shape.tower
    language = Qwen2Config(
        vocab_size=text.rows,
        hidden_size=text.hidden,
        intermediate_size=text.intermediate,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        num_key_value_heads=text.key_value_heads,
        max_position_embeddings=4096,
        initializer_range=text.hidden**-0.5,
        tie_word_embeddings=text.tied,
        bos_token_id=None,
        eos_token_id=SPECIALS.index("<eos>"),
        pad_token_id=SPECIALS.index("<pad>"),
    )
    vision = SiglipVisionConfig(
        hidden_size=tower.hidden,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.side,
        patch_size=tower.patch,
        vision_use_head=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=SPECIALS.index(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.tied,
    )


def _words(n_tokens: int) -> list[str]:
    return [*SPECIALS, *(f"w{number}" for number in range(n_tokens - len(SPECIALS)))]


def _processor(shape: Shape) -> LlavaProcessor:
    words = {word: number for number, word in enumerate(_words(shape.n_tokens))}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=CHAT_TEMPLATE,
    )
    side = shape.tower.side
    pixels = SiglipImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=shape.tower.patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def write_noise(
    path: Path,
    *,
    n: int,
    n_tokens: int,
    side: int,
    words: tuple[int, int],
    picture: Callable[[int], int] = lambda row: row,
) -> None:
    """n rows: a picture of noise, side x side, a question and an answer of random words.

    words:   the fewest and most of a question, and of an answer
    picture: which one a row shows
    """
    rng, known = random.Random(0), _words(n_tokens)[len(SPECIALS) :]
    rows = []
    for number in range(n):
        pixels = np.random.default_rng(picture(number)).integers(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        asked, said = (" ".join(rng.choices(known, k=rng.randint(*words))) for _ in range(2))
        messages = [{"role": "user", "content": f"<image> {asked}"}, {"role": "assistant", "content": said}]
        rows.append({"id": str(number), "images": [{"bytes": buffer.getvalue(), "path": None}], "messages": messages})
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
