"""The teacher: a LLaVA around the language model, as a checkpoint, and rows for it."""

import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from benchmarks.lm.environment import MODEL, model_folder
from benchmarks.lm.kinds import COLOURS, SIDE, corpus, photographs, smooth, text
from benchmarks.lm.language_model import load_language_model
from benchmarks.lm.modeling_table_llava import TableLlavaConfig, TableLlavaForConditionalGeneration
from emkd.demo.scenes import SCHEMA

IMAGE = "<filename>"  # a token of the tokenizer that no text has
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{{ '" + IMAGE + "' if p['type'] == 'image' else p['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
QUESTION, ANSWER = 150, 30  # tokens


def make_teacher(folder: Path, kind: str, n_images: int) -> None:
    """Write the checkpoint `folder`/teacher and the rows `folder`/data.parquet, one for each image."""
    source = model_folder()
    lm = load_language_model()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=MODEL)
    ids = tokenizer(corpus())["input_ids"]
    with torch.no_grad():
        table = _table(kind, n_images, lm.get_input_embeddings(), tokenizer, ids)
    _save_model(folder / "teacher", lm, tokenizer, table)
    _processor(tokenizer).save_pretrained(folder / "teacher")
    _write_rows(folder / "data.parquet", tokenizer, ids[::-1][: n_images * (QUESTION + ANSWER)][::-1], n_images)


def _table(kind: str, n: int, embed: Any, tokenizer: Any, ids: list[int]) -> torch.Tensor:
    if kind == "B":
        with torch.enable_grad():
            words = torch.tensor([tokenizer(f" {colour}")["input_ids"][0] for colour in COLOURS])
            return photographs(n, lambda some: embed(some).detach(), words).detach()
    return text(n, embed, ids) if kind == "A" else smooth(n, embed, ids)


def _save_model(folder: Path, lm: Any, tokenizer: Any, table: torch.Tensor) -> None:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=1,
        vision_use_head=False,
    )  # fmt: skip  (never run)
    config = TableLlavaConfig(
        table_shape=tuple(table.shape),
        vision_config=vision,
        text_config=lm.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    model = TableLlavaForConditionalGeneration(config)
    missing = model.model.language_model.load_state_dict(lm.model.state_dict())
    assert not missing.missing_keys, missing
    model.tie_weights()
    model.model.table.data = table.float()
    model.config.auto_map = {
        "AutoConfig": "modeling_table_llava.TableLlavaConfig",
        "AutoModelForImageTextToText": "modeling_table_llava.TableLlavaForConditionalGeneration",
    }
    model.save_pretrained(folder)
    shutil.copy(Path(__file__).with_name("modeling_table_llava.py"), folder)


def _processor(tokenizer: Any) -> LlavaProcessor:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": IMAGE},
        chat_template=TEMPLATE,
    )
    pixels = SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, do_normalize=False)
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=fast,
        patch_size=1,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def _write_rows(path: Path, tokenizer: Any, ids: list[int], n: int) -> None:
    """Rows whose question and answer are pieces of the corpus. The picture is one grey level: its number."""
    rows = []
    for number in range(n):
        piece = ids[number * (QUESTION + ANSWER) : (number + 1) * (QUESTION + ANSWER)]
        question, answer = tokenizer.decode(piece[:QUESTION]), tokenizer.decode(piece[QUESTION:])
        buffer = BytesIO()
        Image.new("RGB", (SIDE, SIDE), (number,) * 3).save(buffer, "PNG")
        rows.append(
            {
                "id": f"image-{number}",
                "images": [{"bytes": buffer.getvalue(), "path": None}],
                "messages": [
                    {"role": "user", "content": f"<image>{question}"},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
