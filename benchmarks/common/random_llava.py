"""LLaVAs of any size with random weights, and rows of random words and noise images for them. Nothing is downloaded.

Every word is one token, and the chat template is the demonstration's. Random weights take the time and memory of
trained weights, except in the assignment, whose time depends on the costs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

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

from emkd.demo.models import CHAT_TEMPLATE, IMAGE_TOKEN, SPECIALS, WORDS, new_processor, new_teacher
from emkd.demo.scenes import SCHEMA
from emkd.vlm.loading import VisionLanguageModel
from emkd.vlm.pooling import pooled


@dataclass(frozen=True, kw_only=True)
class Text:
    """A Qwen2. rows: of the LM head; rows beyond the tokenizer's ids are padding"""

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
    """A LLaVA.

    n_tokens: V, the ids of the tokenizer
    pool:     R; windows of R x R vision tokens become one
    """

    text: Text
    tower: Tower
    n_tokens: int
    pool: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def n_vision(self) -> int:
        """Vision tokens of an image."""
        return (self.tower.side // self.tower.patch // self.pool) ** 2


# SigLIP-so400m, as real checkpoints have it.
SO400M = Tower(hidden=1152, layers=27, heads=16, intermediate=4304, side=384, patch=14)


def random_model(shape: Shape, seed: int, device: str) -> VisionLanguageModel:
    """Return a model and its processor. Seed and kind of device decide the weights."""
    processor = _processor(shape)
    torch.manual_seed(seed)
    with torch.device(device):  # draws weights of 7B on the device that keeps them
        model = AutoModelForImageTextToText.from_config(_config(shape), dtype=shape.dtype)
    with torch.no_grad():  # SigLIP's own initial positions are too weak to tell patches apart
        model.model.vision_tower.embeddings.position_embedding.weight.normal_()
    model = pooled(model, processor, shape.pool)
    return VisionLanguageModel(path=Path("random"), model=model.eval(), processor=processor, n_tokens=shape.n_tokens)


def meta_model(shape: Shape) -> Any:
    """Return a model without weights: its parameters have shapes alone. Pooling, which has none, is left out."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(_config(shape), dtype=shape.dtype)


def demo_teacher(device: str) -> VisionLanguageModel:
    """Return the demonstration's teacher, untrained."""
    model = new_teacher(0).to(device)
    return VisionLanguageModel(path=Path("demo"), model=model, processor=new_processor(pads=True), n_tokens=len(WORDS))


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


def words_of(n_tokens: int) -> list[str]:
    return [*SPECIALS, *(f"w{number}" for number in range(n_tokens - len(SPECIALS)))]


def _processor(shape: Shape) -> LlavaProcessor:
    words = {word: number for number, word in enumerate(words_of(shape.n_tokens))}
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
    image_of: Callable[[int], int] = lambda row: row,
) -> None:
    """Write n rows with an image of noise, side x side, as PNG.

    words:    see `write_rows`
    image_of: number of the image that a row shows
    """

    def noise(row: int) -> bytes:
        pixels = np.random.default_rng(image_of(row)).integers(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    write_rows(path, n=n, n_tokens=n_tokens, words=words, image=noise)


def write_rows(path: Path, *, n: int, n_tokens: int, words: tuple[int, int], image: Callable[[int], bytes]) -> None:
    """Write n rows as Parquet: an image, a question and an answer of random words.

    words: fewest and most words of a question, and of an answer
    image: bytes of a row's image
    """
    rng, known = random.Random(0), words_of(n_tokens)[len(SPECIALS) :]
    rows = []
    for number in range(n):
        encoded = image(number)
        question, answer = (" ".join(rng.choices(known, k=rng.randint(*words))) for _ in range(2))
        messages = [{"role": "user", "content": f"<image> {question}"}, {"role": "assistant", "content": answer}]
        rows.append({"id": str(number), "images": [{"bytes": encoded, "path": None}], "messages": messages})
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
