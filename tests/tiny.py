"""Small real things for tests: a LLaVA with random weights, rows with images, a cache of them.

The tokenizer is word by word with a turn-end token, so that a test can write down the token ids it expects. The
LM head has padding rows, as big checkpoints have.
"""

import io
import json
from collections.abc import Sequence
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
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.preflight import spread
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples.dataset import Dataset
from emkd.storage.cache import create_cache
from emkd.storage.index.commit import missing_shards
from emkd.storage.lifecycle.extend import extend_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.open import open_files

SPECIALS = ("<pad>", "<unk>", "<image>", "<end>", "user:", "assistant:")
WORDS = tuple(
    [
        "what",
        "is",
        "in",
        "this",
        "picture",
        "and",
        "that",
        "one",
        "red",
        "green",
        "blue",
        "big",
        "small",
        "cat",
        "dog",
        "none",
        "of",
        "them",
        "yes",
        "no",
    ]
)
VOCABULARY = (*SPECIALS, *WORDS)
SIDE, PATCH = 20, 5  # 4 x 4 = 16 vision tokens an image
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}"
    "{{ ' <image>' if p['type'] == 'image' else ' ' + p['text'] }}{% endfor %}"
    "{{ ' <end>\n' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt else '' }}"
)


def new_processor(words: Sequence[str] = VOCABULARY, side: int = SIDE) -> LlavaProcessor:
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS[:4]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
    )
    pixels = SiglipImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def new_model(seed: int, hidden: int, lm_head_rows: int, side: int = SIDE) -> LlavaForConditionalGeneration:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=lm_head_rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIALS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # SigLIP starts from noise that hardly tells one patch from another
        model.model.vision_tower.embeddings.position_embedding.weight.normal_()
    return model.eval()


def save_model(
    folder: Path,
    *,
    seed: int,
    hidden: int,
    lm_head_rows: int = 64,
    words: Sequence[str] = VOCABULARY,
    side: int = SIDE,
) -> Path:
    new_model(seed, hidden, lm_head_rows, side).save_pretrained(folder)
    new_processor(words, side).save_pretrained(folder)
    return folder


GAPPED = {"cat": 55, "dog": 40, "no": 30}  # ids of words in a tokenizer with gaps


def save_gapped(folder: Path, **options: Any) -> Path:
    """A checkpoint of as many tokens, whose largest id is 55."""
    save_model(folder, **options)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= GAPPED
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def png(seed: int, height: int = 24, width: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows() -> list[dict[str, Any]]:
    """One image, several images, none, several turns, an image in a later turn, a repeated and a missing id."""
    return [
        {"id": "one", "images": [png(1)], "messages": [turn("user", "<image>\nwhat is in this picture"), turn("assistant", "red cat")]},
        {"id": "two", "images": [png(2), png(3)], "messages": [turn("user", "<image> and <image> what is that"), turn("assistant", "big dog")]},
        {"id": "text", "images": [], "messages": [turn("user", "is that one red"), turn("assistant", "no it is blue")]},
        {"id": "one", "images": [png(4)], "messages": [turn("user", "<image>\nwhat"), turn("assistant", "cat"), turn("user", "is that big"), turn("assistant", "yes and red")]},
        {"id": None, "images": [png(5), png(6)], "messages": [turn("user", "what is <image>"), turn("assistant", "dog"), turn("user", "and <image>"), turn("assistant", "small green cat")]},
        {"id": "last", "images": [png(7)], "messages": [turn("user", "is <image> blue"), turn("assistant", "none of them")]},
    ]  # fmt: skip


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)


def write_data(path: Path, chosen: Sequence[dict[str, Any]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [
        {**row, "images": [{"bytes": data, "path": None} for data in row["images"]]}
        for row in (rows() if chosen is None else chosen)
    ]
    pq.write_table(pa.Table.from_pylist(content, SCHEMA), path)
    return path


def write_llava(folder: Path, chosen: Sequence[dict[str, Any]], lines: bool = False) -> Path:
    """The same rows as LLaVA-style JSON or JSONL, with images as files below the folder."""
    names = {"user": "human", "assistant": "gpt"}
    found = []
    for number, row in enumerate(chosen):
        paths = [f"images/{number}-{n}.png" for n in range(len(row["images"]))]
        for path, data in zip(paths, row["images"], strict=True):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        turns = [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]
        found.append({"id": row["id"], "conversations": turns, **({"image": paths} if paths else {})})
    file = folder / ("rows.jsonl" if lines else "rows.json")
    file.write_text("\n".join(map(json.dumps, found)) if lines else json.dumps(found))
    return file


def make_cache(
    teacher: Path, data: Path, cache: Path, *, extend: bool = False, first_format: bool = False, **chosen: Any
) -> Path:
    """The job without Ray: the same worker, shard by shard, and the seal.

    first_format: start the cache in format version 1, as an older emkd would have
    """
    defaults: dict[str, Any] = {
        "top_k": 0, "answer_top_k": 0, "precision": "float32", "affinity_precision": "float32",
        "rows_per_shard": 4, "gpus_per_worker": 0, "logit_error": "none",
    }  # fmt: skip
    settings = JobSettings(teacher=str(teacher), data=str(data), cache=str(cache), **{**defaults, **chosen})
    dataset = Dataset(settings.data, settings.image_root)
    run, tokenizer = job_manifest(settings, dataset)
    run = run.in_format(1) if first_format else run
    if extend:
        extend_cache(open_files(settings.cache), run, tokenizer, dataset.keyed_rows)
    basis = None
    if run.codes is not None and not extend:
        found = CaptureWorker(settings, run).choose_basis(spread(run, run.shards)[1]).basis
        basis = found.to_bytes()
        run = run.with_basis(found.identity(basis))
    files = create_cache(settings.cache, run, tokenizer, basis)
    manifest = read_manifest(files)
    worker = CaptureWorker(settings, manifest)
    for number in missing_shards(files, manifest):
        worker.capture_shard(number)
    seal(files)
    return cache
